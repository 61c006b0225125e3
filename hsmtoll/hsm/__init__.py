"""
PKCS#11: the only package that uses a device, a private key or a PIN.

    uri          RFC 7512: which token, which object
    facts        what a module reports about tokens, keys and certificates, as values
    device       the Protocol: certificates, key, signature, administration
    pin          sources of a PIN, and the type that holds it
    pin_log      refused PINs and open attempts, so that no PIN is tried twice
    codes        return values of a module, and the errors that they become
    module       the module: initialised once, used under one lock, reinitialised after a fork
    connection   module, token, session and login of one device
    login        login, once per token and process, by the rules of the PIN log
    select       selects token and key by the URI
    lookup       certificates and key, after the login
    signatures   which data may be signed, and the verification of signatures
    signing_key  one signature by the key: mechanism and context-specific login
    recovery     the circuit breaker, and the choice of a recovery step
    calls        one call: circuit breaker, lock, and recovery after an error
    in_process   the device with the module in this process, made of the above
    pool         the device with the module in workers: child, pipe, codec; worker is their program
    objects      writes to a token: a key pair, certificates
    inspect      everything that a module shows, for users who look for the right URI
    reading      reads tokens, keys and certificates into the values of facts
    cryptoki     workarounds in python-pkcs11 for modules that deviate from the standard
    answers      names and meanings of the CKR codes that python-pkcs11 has no class for
    makers       how each maker's module finds its device, and the tool that generates a key
    public_key   the public key in a file, for devices that do not show it
    protect      keeps other processes from reading the memory of one that holds a PIN

A private key's value never leaves the token: this package has handles only. It knows the form of a
grant, because it signs nothing else. Importing the package loads neither a module nor
python-pkcs11.
"""
