"""
Test support for hsmtoll and its users: temporary devices, identities, and pytest fixtures.

    provision   a child process that creates keys and certificates on a PKCS#11 token
    softhsm     a temporary SoftHSM device, without root or slot ids
    identity    an eSeal, a Norwegian certificate or a Norwegian key, with device and settings
    plugin      the same as pytest fixtures, with the prefix toll_

Importing the package imports none of them.
"""
