"""
Customs tokens: obtained with a signed grant, cached, shared between processes, renewed.

    token_service ──► cache ──► single_flight ──► renewal ──► rate_limit, Signer, exchange
                        └──► stores (memory, files, Redis)                       └──► AccessToken

`configured` reads endpoints, store and cache key from the settings.
"""
