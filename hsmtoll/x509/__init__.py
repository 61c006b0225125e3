"""
X.509: parsing certificates, building a verified chain, choosing the signing certificate.

    certificate_files ──► certificate ──► path_building ──► certificate_checks ──► leaf_choice
    PEM, DER, PKCS#7      what it says    signatures         what is refused        which one

Nothing is trusted here: trust is Maskinporten's part. Only `followed` opens a file.
"""
