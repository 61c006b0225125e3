"""
Signed grants: `grant` builds the claims, `signer` signs them on a device, `remote` on another host.

    TokenRequest ──► Signer.sign ──► SignedGrant

`verification` verifies every grant that a signing host returns.
"""
