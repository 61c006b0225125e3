"""
A signature is a value: `grant` says what is signed, `signer` who signs, here or elsewhere.

    TokenRequest ──► Signer.sign ──► SignedGrant

`remote` asks a signing host, and `verification` believes nothing that it answers.
"""
