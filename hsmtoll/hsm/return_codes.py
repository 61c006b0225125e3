"""
The CKR codes that python-pkcs11 has no class for: those of PKCS#11 3.1, and those that makers of
modules define. Data: the name of each, what to do about it, and of what kind it is.

Makers' codes are taken from headers that they publish (Thales Luna, SafeNet ProtectToolkit, NSS).
Two makers may give one number two meanings, so the sentence names the maker.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["RETURN_CODES", "ReturnCode", "in_words"]

_VENDOR_DEFINED: Final = 0x80000000


class ReturnCode(NamedTuple):
    """
    A code's *name*, and what to do (*advice*). *kind* is ``refused`` (asking again does not help),
    ``away`` (the device may be back later), ``locked`` or ``pin`` (the PIN or its state).
    """

    name: str
    advice: str
    kind: str = "refused"


_OWN_TOOL: Final = "use the device's own tool for it"
_ADMINISTRATOR: Final = "the device's administrator must change that"
_NETWORK: Final = "the HSM cannot be reached: is it running, and the network between?"
_NO_MEMBER: Final = "no HSM of the group answers: are they running, and the network between?"
_CHANNEL: Final = (
    "the secure channel to the HSM is broken: it is opened again by itself; where it is not, the"
    " device's administrator must register this client anew"
)
_CLIENT: Final = "the maker's client on this machine is set up wrongly: see its configuration"
_MAKER: Final = "the module did something that it should not: ask its maker, with its log"
_FULL: Final = "the device is full: delete what is not needed, or ask its administrator"

_LUNA: Final = {
    0x04: ("RC_ERROR", _MAKER, "away"),
    0x05: ("CONTAINER_HANDLE_INVALID", "the partition was taken away or the HSM restarted", "away"),
    0x06: ("TOO_MANY_CONTAINERS", _FULL),
    0x07: ("USER_LOCKED_OUT", "the partition's security officer must reset the role", "locked"),
    0x0C: ("ACCEL_DEVICE_ERROR", _NETWORK, "away"),
    0x1A: ("USER_NOT_AUTHORIZED", "this role may not do that: " + _ADMINISTRATOR),
    0x1B: ("MAX_OBJECT_COUNT_EXCEEDED", _FULL),
    0x1C: ("SO_LOGIN_FAILURE_THRESHOLD", "the security officer is locked out", "locked"),
    0x1F: ("UNABLE_TO_CONNECT", _NETWORK, "away"),
    0x20: ("PARTITION_DISABLED", _ADMINISTRATOR),
    0x21: ("CALLBACK_ERROR", _CLIENT, "away"),
    0x22: ("SECURITY_PARAMETER_MISSING", _ADMINISTRATOR),
    0x23: ("SP_TIMEOUT", _NETWORK, "away"),
    0x24: ("TIMEOUT", _NETWORK, "away"),
    0x26: ("MTK_ZEROIZED", "the HSM was tampered with or transported: " + _ADMINISTRATOR),
    0x2A: ("HSM_STORAGE_FULL", _FULL),
    0x2B: ("DEVICE_TIMEOUT", _NETWORK, "away"),
    0x2C: ("CONTAINER_OBJECT_STORAGE_FULL", _FULL),
    0x2D: ("PED_CLIENT_NOT_RUNNING", "start the remote PED client", "away"),
    0x2E: ("PED_UNPLUGGED", "connect the PED", "away"),
    0x30: ("OPERATION_NOT_ALLOWED", "the partition's policy forbids it: " + _ADMINISTRATOR),
    0x31: ("LICENSE_CAPACITY_EXCEEDED", "the HSM's licence is used up"),
    0x35: ("LOG_FULL", "the HSM's audit log is full: its auditor must rotate it", "away"),
    0x39: ("LOG_AUDIT_NOT_INITIALIZED", "the HSM's auditor must set up the audit role"),
    0x41: ("AGAIN", "the HSM is busy", "away"),
    0x67: (
        "CHALLENGE_INCORRECT",
        "the partition's challenge secret is wrong: correct the PIN",
        "pin",
    ),
    0x6E: ("CMD_NOT_ALLOWED_HSM_IN_TRANSPORT", "the HSM is in transport mode"),
    0x6F: ("OBJECT_ALREADY_EXISTS", "choose another label or id"),
    0x76: ("HSM_TAMPERED", "the HSM found that it was tampered with: " + _ADMINISTRATOR),
    0x7E: ("CERTIFICATE_TYPE_INVALID", _OWN_TOOL),
    0x8D: ("HSM_RESTART_REQUIRED", "the device's administrator must restart the HSM"),
    **dict.fromkeys(range(0x45, 0x67), ("STC_…", _CHANNEL, "away")),
}

_PROTECTTOOLKIT: Final = {
    0x101: ("TIME_STAMP", "the HSM's clock is not set: " + _ADMINISTRATOR),
    0x102: ("ACCESS_DENIED", _ADMINISTRATOR),
    0x103: ("CRYPTOKI_UNUSABLE", _CLIENT, "away"),
    0x104: ("ENCODE_ERROR", _MAKER),
    0x105: ("V_CONFIG", _CLIENT),
    0x106: ("SO_NOT_LOGGED_IN", "the security officer must do it with the device's own tool"),
    0x107: ("CERT_NOT_VALIDATED", _OWN_TOOL),
    0x108: ("PIN_ALREADY_INITIALIZED", _OWN_TOOL),
    0x10A: ("REMOTE_SERVER_ERROR", _NETWORK, "away"),
    0x10B: ("CSA_HW_ERROR", _NETWORK, "away"),
    0x114: ("OBJECT_READ_ONLY", _OWN_TOOL),
    0x115: ("TOKEN_READ_ONLY", _OWN_TOOL),
    0x116: ("TOKEN_NOT_INITIALIZED", "initialise it with the device's own tool"),
    0x117: ("NOT_ADMIN_TOKEN", _OWN_TOOL),
    0x130: ("AUTHENTICATION_REQUIRED", "give the PIN: HSMTOLL_HSM__PIN_FILE or another source"),
    0x131: ("OPERATION_NOT_PERMITTED", _ADMINISTRATOR),
    0x136: ("KEY_NOT_ACTIVE", "the key's period has not begun or is over: take another"),
    0x381: ("CANNOT_DERIVE_KEYS", _CHANNEL, "away"),
    0x382: ("BAD_REQ_SIGNATURE", _CHANNEL, "away"),
    0x383: ("BAD_REPLY_SIGNATURE", _CHANNEL, "away"),
    0x384: ("SMS_ERROR", _CHANNEL, "away"),
    0x385: ("BAD_PROTECTION", _CHANNEL, "away"),
    0x386: ("DEVICE_RESET", "the HSM was restarted", "away"),
    0x387: ("NO_SESSION_KEYS", _CHANNEL, "away"),
    0x388: ("BAD_REPLY", _CHANNEL, "away"),
    0x389: ("KEY_ROLLOVER", _CHANNEL, "away"),
    0x1001: ("BAD_REQUEST", _MAKER),
    0x1002: ("BAD_ATTRIBUTE_PACKING", _MAKER),
    0x1003: ("BAD_ATTRIBUTE_COUNT", _MAKER),
    0x1004: ("BAD_PARAM_PACKING", _MAKER),
    0x1386: ("EXTERN_DCP_ERROR", _NETWORK, "away"),
    0x1400: ("HIMK_NOT_FOUND", _ADMINISTRATOR),
    **dict.fromkeys(range(0x2001, 0x2008), ("WLD_CONFIG_…", _CLIENT)),
    0x2010: ("WLD_LOGIN_CACHE_INCONSISTENT", _CLIENT, "away"),
    **dict.fromkeys(range(0x3001, 0x3008), ("HA_…", _NO_MEMBER, "away")),
}

#: CKR code → answer.
RETURN_CODES: Final[dict[int, ReturnCode]] = {
    0x001: ReturnCode("CKR_CANCEL", "somebody cancelled it at the device: do it again"),
    0x009: ReturnCode("CKR_NEED_TO_CREATE_THREADS", _CLIENT),
    0x00A: ReturnCode("CKR_CANT_LOCK", "the module takes no program with threads: ask its maker"),
    0x01B: ReturnCode(
        "CKR_ACTION_PROHIBITED", "the device forbids this action for this object: " + _OWN_TOOL
    ),
    0x042: ReturnCode("CKR_AEAD_DECRYPT_FAILED", _MAKER),
    0x051: ReturnCode("CKR_FUNCTION_NOT_PARALLEL", _MAKER),
    0x052: ReturnCode("CKR_FUNCTION_PARALLEL", _MAKER),
    0x065: ReturnCode("CKR_KEY_CHANGED", _MAKER),
    0x068: ReturnCode(
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "the key's attributes or the device's policy forbid this use of it;"
        " choose another key, or ask the device's administrator",
    ),
    0x0B2: ReturnCode("CKR_SESSION_EXCLUSIVE_EXISTS", "end what else uses the device", "away"),
    0x0B4: ReturnCode("CKR_SESSION_PARALLEL_NOT_SUPPORTED", _MAKER),
    0x103: ReturnCode(
        "CKR_USER_TYPE_INVALID",
        "the device does not take this user, or not for this: it may want its"
        " administrator (SO, management key), so " + _OWN_TOOL,
    ),
    0x140: ReturnCode("CKR_CURVE_NOT_SUPPORTED", "use an RSA key"),
    0x150: ReturnCode("CKR_BUFFER_TOO_SMALL", _MAKER, "away"),
    0x160: ReturnCode("CKR_SAVED_STATE_INVALID", _MAKER),
    0x170: ReturnCode("CKR_INFORMATION_SENSITIVE", "the device does not show this"),
    0x180: ReturnCode("CKR_STATE_UNSAVEABLE", _MAKER),
    0x190: ReturnCode(
        "CKR_CRYPTOKI_NOT_INITIALIZED",
        "the module was ended by its own service or by other code of this process;"
        " it is started again by itself",
        "away",
    ),
    0x191: ReturnCode(
        "CKR_CRYPTOKI_ALREADY_INITIALIZED", "other code of this process opened the module", "away"
    ),
    0x1A0: ReturnCode("CKR_MUTEX_BAD", _MAKER),
    0x1A1: ReturnCode("CKR_MUTEX_NOT_LOCKED", _MAKER),
    0x1B0: ReturnCode("CKR_NEW_PIN_MODE", "set a new PIN with the device's own tool", "pin-state"),
    0x1B1: ReturnCode(
        "CKR_NEXT_OTP", "it wants its next one-time password: use a PIN that stays", "pin-state"
    ),
    0x1B6: ReturnCode(
        "CKR_FIPS_SELF_TEST_FAILED",
        "the device's self-test failed and it does nothing more: ask its administrator or maker",
    ),
    0x1B7: ReturnCode("CKR_LIBRARY_LOAD_FAILED", _CLIENT),
    0x201: ReturnCode(
        "CKR_TOKEN_RESOURCE_EXCEEDED",
        "end what else uses the device: it has no room left for this",
        "away",
    ),
    0x202: ReturnCode("CKR_OPERATION_CANCEL_FAILED", _MAKER, "away"),
    0x203: ReturnCode(
        "CKR_KEY_EXHAUSTED", "the key's number of signatures is used up: make a new key"
    ),
    # CKR_NSS is 0x80000000 with the bytes "NSCP".
    0xCE534351: ReturnCode(
        "CKR_NSS_CERTDB_FAILED",
        "NSS cannot use its certificate database: see"
        " configdir in NSS_LIB_PARAMS, and who may write there",
    ),
    0xCE534352: ReturnCode(
        "CKR_NSS_KEYDB_FAILED",
        "NSS cannot use its key database: see configdir in NSS_LIB_PARAMS, and who may write there",
    ),
    **{
        _VENDOR_DEFINED + n: ReturnCode(f"CKR_{name} of Thales Luna", *more)
        for n, (name, *more) in _LUNA.items()
    },
    **{
        _VENDOR_DEFINED + n: ReturnCode(f"CKR_{name} of SafeNet ProtectToolkit", *more)
        for n, (name, *more) in _PROTECTTOOLKIT.items()
    },
}


def in_words(code: int) -> str:
    """*code* with its name, or with the note that its maker defined it."""
    known = RETURN_CODES.get(code)
    if known is not None:
        return f"{known.name} ({code:#x})"
    return f"{code:#x}, a code of the maker's own" if code >= _VENDOR_DEFINED else f"{code:#x}"
