"""
`hsmtoll proxy`: puts the Customs token on requests of local programs that only speak HTTP.

    program ──HTTP──► server ──► admission: what may pass ──► forward ──HTTPS + bearer──► Customs

Tokens come from the same token service as everywhere else.
"""
