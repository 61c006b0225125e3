"""
Calls to the Customs APIs with a defined outcome: submissions, uploads, the routing feed.

    submissions, uploads ──► conversation ──► limits: one request, bounded ──► errors: what it means
    routing ─────────────────────────────────────┘

Tokens are obtained elsewhere (httpx.Auth).
"""
