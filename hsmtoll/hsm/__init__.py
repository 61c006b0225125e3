"""
The only room with a key in it, and the only door to PKCS#11. In the order of the story:

    uri       RFC 7512: which device, which object
    pin       where a PIN comes from, and the one type it travels in
    ledger    which PINs were refused, so that none is tried twice
    codes     what a module can answer, and which of our errors it becomes
    module    the library: loaded once, used under one lock, started afresh after a fork
    device    one key: find it, log in, prove it, sign with it
    inspect   everything that can be seen, for people who look for the right URI

A private key's value never enters: only handles do. Nothing here knows Maskinporten.
Importing the package loads neither a module nor python-pkcs11.
"""
