"""
Signed grants, from the request to the verified JWS.

    grant                header and claims of a JWT grant, and the reader of one
    signer               the Protocol: TokenRequest ──► Signer.sign ──► SignedGrant
    local                signs with the key of a device
    device_chain         the chain for x5c: which leaf, and for how long
    device_certificates  certificates on a device, read in steps
    failover             the first usable one of several local signers
    one_time             a grant that was signed before
    remote               grants of the first signing host that works
    signing_host         one signing host: connection, authentication, errors
    host_trust           who may listen at the Unix socket of a signing host
    replies              error responses of a signing host
    verification         verifies each grant that a signing host returns
    configured           the signers that the settings name
"""
