"""
X.509: parsing certificates, building a verified chain, choosing the signing certificate.

    certificate_files ──► certificate ──► path_building ──► certificate_checks ──► leaf_choice
    PEM, DER, PKCS#7      names,          signatures        what is refused        which one
                          algorithms,
                          extensions

No certificate is trusted here: Maskinporten decides about trust. Only `reloading` opens a file.
"""
