"""
From a signed grant to a Customs token, and how that is kept, shared and renewed.

    engine ──► cache ──► single_flight ──► renewal ──► rate_limit, Signer, exchange ──► AccessToken
                 └──► stores (memory, files, Redis)
"""
