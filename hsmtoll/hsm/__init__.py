"""
The only room with a key in it, and the only door to PKCS#11. In the order of the story:

    uri         RFC 7512: which device, which object
    facts       what a device says of itself, its keys and certificates, as values
    device      the Protocol: certificates, key, sign, and what administers a device
    pin         where a PIN comes from, and the one type it travels in
    pin_log     which PINs were refused, so that none is tried twice
    codes       what a module can answer, and which of our errors it becomes
    module      the library: loaded once, used under one lock, started afresh after a fork
    login       logging in, once a device and process, under the ledger's rules
    select      which device and which key a URI means
    signatures  what is signed at all, and the proof of what came out
    recovery    which steps may cure a device that failed, and when it is left alone
    in_process  the device whose module runs in this process
    pool        the device whose module runs in workers: child, pipe, codec; worker is their program
    objects     what is written to a device: a key pair, certificates
    inspect     everything that can be seen, for people who look for the right URI

A private key's value never enters: only handles do. Of Maskinporten it knows what a grant looks
like, because it signs nothing else. Importing the package loads neither a module nor python-pkcs11.
"""
