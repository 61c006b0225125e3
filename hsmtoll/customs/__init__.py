"""
Calls to the Customs APIs that end in an answer: submissions, uploads, the routing feed.

    submissions, uploads ──► conversation ──► limits: one request, bounded ──► errors: what it means
    routing ─────────────────────────────────────┘

How a token is had never enters.
"""
