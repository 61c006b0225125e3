"""
For tests, yours and ours: throw-away devices, identities, and the sandbox as fixtures.

    provision   runs in a child process: keys and certificates onto a p11_token
    softhsm     a SoftHSM device of one's own, without root, slot numbers or leftovers
    identity    an eSeal, a Norwegian certificate, a Norwegian key: device and settings together
    plugin      the same as pytest fixtures, each prefixed toll_

Importing the package imports none of them.
"""
