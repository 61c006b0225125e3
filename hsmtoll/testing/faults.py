"""
Named device faults, injected at the PKCS#11 call, and counts of calls.

A small PKCS#11 module (shim.c), compiled on first use, forwards calls to the real one. Faults and
counts are in shared memory: they apply at once, in every process.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import DeviceError, UsageError
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

__all__ = ["FUNCTIONS", "NAMES", "Faults"]

#: The function list of PKCS#11 v2.40, in its order.
FUNCTIONS: Final = (
    "C_Initialize", "C_Finalize", "C_GetInfo", "C_GetFunctionList", "C_GetSlotList",
    "C_GetSlotInfo", "C_GetTokenInfo", "C_GetMechanismList", "C_GetMechanismInfo", "C_InitToken",
    "C_InitPIN", "C_SetPIN", "C_OpenSession", "C_CloseSession", "C_CloseAllSessions",
    "C_GetSessionInfo", "C_GetOperationState", "C_SetOperationState", "C_Login", "C_Logout",
    "C_CreateObject", "C_CopyObject", "C_DestroyObject", "C_GetObjectSize",
    "C_GetAttributeValue", "C_SetAttributeValue", "C_FindObjectsInit", "C_FindObjects",
    "C_FindObjectsFinal", "C_EncryptInit", "C_Encrypt", "C_EncryptUpdate", "C_EncryptFinal",
    "C_DecryptInit", "C_Decrypt", "C_DecryptUpdate", "C_DecryptFinal", "C_DigestInit",
    "C_Digest", "C_DigestUpdate", "C_DigestKey", "C_DigestFinal", "C_SignInit", "C_Sign",
    "C_SignUpdate", "C_SignFinal", "C_SignRecoverInit", "C_SignRecover", "C_VerifyInit",
    "C_Verify", "C_VerifyUpdate", "C_VerifyFinal", "C_VerifyRecoverInit", "C_VerifyRecover",
    "C_DigestEncryptUpdate", "C_DecryptDigestUpdate", "C_SignEncryptUpdate",
    "C_DecryptVerifyUpdate", "C_GenerateKey", "C_GenerateKeyPair", "C_WrapKey", "C_UnwrapKey",
    "C_DeriveKey", "C_SeedRandom", "C_GenerateRandom", "C_GetFunctionStatus", "C_CancelFunction",
    "C_WaitForSlotEvent",
)  # fmt: skip

#: Name of a fault → its effect and options.
NAMES: Final[Mapping[str, str]] = {
    "pin-wrong": "C_Login answers CKR_PIN_INCORRECT to every PIN; the device is not asked",
    "pin-count-low": "the flag CKF_USER_PIN_COUNT_LOW",
    "pin-final-try": "the flags COUNT_LOW and CKF_USER_PIN_FINAL_TRY",
    "pin-locked": "the flag CKF_USER_PIN_LOCKED, and CKR_PIN_LOCKED from C_Login",
    "pin-last-try": "the next wrong PIN is answered CKR_PIN_LOCKED, and pin-locked from then on",
    "session-lost": "once: every open session is gone, and the login with them",
    "handles-stale": "once: every object handle that was given is void; a new search helps",
    "token-removed": "the slot is empty until cleared; then the sessions are gone",
    "device-error": "once: CKR_DEVICE_ERROR to everything until C_Finalize and C_Initialize",
    "slow": "function='C_Sign' takes ms=1000 more",
    "latency": "every call takes ms=1000 more",
    "hang": "function='C_Sign' does not return until cleared",
    "wrong-signature": "one bit of every signature is flipped",
    "mechanism-missing": "no SHAxxx_RSA_PKCS; with raw=True no RSA_PKCS either",
    "hidden-modulus": "no public half can be read: no public-key objects, no modulus",
    "nth-call-fails": "the n=1st call of function='C_Sign' from now on answers rv=0x30",
    "crash": "the process aborts in function='C_Sign'",
    "rate": "one C_SignInit in ms=1000, for all processes together",
    "kill-inside-login": "the process is killed in C_Login, after=False or True the real call",
    "slot-error": "one more slot, whose C_GetTokenInfo answers CKR_DEVICE_ERROR",
    "slot-info-error": "one more slot, whose C_GetSlotInfo answers it as well",
    "call-fails": "every call of function='C_Sign' answers rv=0x30 until cleared",
    "login-needed": "CKR_USER_NOT_LOGGED_IN to C_FindObjectsInit before C_Login; after=True to"
    " C_GetAttributeValue as well",
    "login-ended": "the device ends each login after n=1 signatures; keys stay visible",
    "login-unflagged": "no flag CKF_LOGIN_REQUIRED",
    "token-unflagged": "no flag CKF_TOKEN_INITIALIZED",
    "object-unreadable": "every attribute of the objects with label='' answers rv=0x30",
    "attribute-fails": "reads that have attribute=0x202 among others answer rv=0x30",
    "signature-short": "signatures lack the zero bytes that they begin with",
    "data-limit": "C_Sign answers rv=0x30 to more than n=1 bytes",
    "session-limit": "CKR_SESSION_COUNT where n=1 sessions are open",
    "value-padded": "values of certificates are filled up to n=1 bytes with the byte rv=0x30",
    "label-nul": "the p11_token's label ends with a NUL, and blanks after it",
    "user-type": "C_Login takes the PIN of the user type n=1 and of no other",
    "context-login-untold": "CKA_ALWAYS_AUTHENTICATE reads false",
    "context-login-unknown": "CKA_ALWAYS_AUTHENTICATE reads true, and C_Login answers"
    " CKR_USER_TYPE_INVALID to CKU_CONTEXT_SPECIFIC",
    "template-refused": "templates for new objects that have attribute=0x202 are answered rv=0x30",
    "attribute-value": "attribute=0x202 of private keys reads true, or false with n=0",
    "session-exclusive": "C_OpenSession for writing is answered rv=0x30 while others are open, and"
    " for others while such a session is open",
    "session-read-only": "C_OpenSession for reading and writing is answered rv=0x30",
    "object-replaced": "a certificate that is written takes the place of another one",
}

# struct control of shim.c, behind the counts.
_MEMBERS: Final = (
    "pin_wrong", "pin_flags", "pin_locked", "sessions", "handles", "device", "removed",
    "slow_function", "slow_ms", "hang_function", "wrong_signature", "hidden_mechanisms",
    "hidden_modulus", "nth_function", "nth_left", "nth_answer", "crash_function", "rate_ms",
    "rate_next_ms", "kill_login", "slot_error", "fail_function", "fail_answer", "login_needed",
    "login_lives", "flags_missing", "label_0", "label_1", "label_2", "label_3", "object_answer",
    "attribute", "attribute_answer", "short_signature", "most_data", "most_data_answer",
    "most_sessions", "open_sessions", "padded_to", "padded_with", "label_nul", "user_type",
    "context_login",
    "template_attribute", "template_answer", "shown_attribute", "shown_value", "read_write_answer",
    "replaces", "exclusive_answer", "latency_ms",
)  # fmt: skip
_SIZE: Final = 8 * (len(FUNCTIONS) + len(_MEMBERS))
_EPOCHS: Final = frozenset(("sessions", "handles", "device"))
#: Counted by the shim itself.
_COUNTED: Final = frozenset(("open_sessions",))
_COUNT_LOW, _FINAL_TRY, _LOCKED = 0x10000, 0x20000, 0x40000
_LOGIN_REQUIRED, _INITIALIZED = 0x4, 0x400

#: Name of a fault → members of the shim's control that it sets; the last one starts it. A string
#: names the option that gives the value.
_SETS: Final[Mapping[str, Mapping[str, int | str]]] = {
    "pin-wrong": {"pin_wrong": 1},
    "pin-count-low": {"pin_flags": _COUNT_LOW},
    "pin-final-try": {"pin_flags": _COUNT_LOW | _FINAL_TRY},
    "pin-locked": {"pin_flags": _LOCKED, "pin_locked": 1},
    "pin-last-try": {"pin_locked": 2},
    "session-lost": {"sessions": 1},
    "handles-stale": {"handles": 1},
    "token-removed": {"removed": 1},
    "device-error": {"device": 1},
    "slow": {"slow_ms": "ms", "slow_function": "function"},
    "latency": {"latency_ms": "ms"},
    "hang": {"hang_function": "function"},
    "wrong-signature": {"wrong_signature": 1},
    "mechanism-missing": {"hidden_mechanisms": "raw"},
    "hidden-modulus": {"hidden_modulus": 1},
    "nth-call-fails": {"nth_left": "n", "nth_answer": "rv", "nth_function": "function"},
    "crash": {"crash_function": "function"},
    "rate": {"rate_ms": "ms"},
    "kill-inside-login": {"kill_login": "after"},
    "slot-error": {"slot_error": 1},
    "slot-info-error": {"slot_error": 2},
    "call-fails": {"fail_answer": "rv", "fail_function": "function"},
    "login-needed": {"login_needed": "after"},
    "login-ended": {"login_lives": "n+1"},
    "login-unflagged": {"flags_missing": _LOGIN_REQUIRED},
    "token-unflagged": {"flags_missing": _INITIALIZED},
    "object-unreadable": {"label_0": "label", "object_answer": "rv"},
    "attribute-fails": {"attribute": "attribute", "attribute_answer": "rv"},
    "signature-short": {"short_signature": 1},
    "data-limit": {"most_data_answer": "rv", "most_data": "n"},
    "session-limit": {"most_sessions": "n"},
    "value-padded": {"padded_with": "rv", "padded_to": "n"},
    "label-nul": {"label_nul": 1},
    "user-type": {"user_type": "n+1"},
    "context-login-untold": {"context_login": 1},
    "context-login-unknown": {"context_login": 2},
    "template-refused": {"template_attribute": "attribute", "template_answer": "rv"},
    "attribute-value": {"shown_attribute": "attribute", "shown_value": "boolean"},
    "session-read-only": {"read_write_answer": "rv"},
    "session-exclusive": {"exclusive_answer": "rv"},
    "object-replaced": {"replaces": 1},
}
#: Name of a fault → members that the shim itself sets while the fault lasts.
_SET_BY_SHIM: Final = {"pin-last-try": ("pin_flags",), "rate": ("rate_next_ms",)}


class Faults:
    """
    Faults of the device behind *module*, as a context manager.

        with Faults(device.module, tmp_path / "faults") as faults:
            faults.set("pin-locked")
            ...                         # HSMTOLL_HSM__MODULE = faults.module
            assert faults.count("C_Login") == 0

    *directory* (0700) holds the shim and its shared memory. Raises DeviceError
    (``compiler-missing``) where there is no C compiler.
    """

    def __init__(self, module: Path, directory: Path) -> None:
        self._real = module
        # Compiled into the shim, which other processes load from directories of their own.
        self._directory = directory.absolute()
        self._memory: mmap.mmap | None = None

    @property
    def module(self) -> Path:
        """The path to use instead of the real module's."""
        return self._directory / "shim.so"

    def environ(self) -> dict[str, str]:
        """The variable that selects the shim instead of the real module."""
        return {"HSMTOLL_HSM__MODULE": str(self.module)}

    def __enter__(self) -> Self:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        control = self._directory / "control"
        control.touch(mode=0o600)
        control.write_bytes(bytes(_SIZE))
        self._compile(control)
        descriptor = os.open(control, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._memory is not None:
            # The shim stays loaded in this process: without faults it only forwards calls.
            self.clear()
            self._memory.close()
            self._memory = None

    def _compile(self, control: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise DeviceError(
                "device faults: there is no C compiler on this machine",
                hint="install one (Debian: apt-get install gcc libc6-dev)",
                code="compiler-missing",
            )
        source = Path(__file__).with_name("shim.c")
        done = subprocess.run(
            [
                *(compiler, "-shared", "-fPIC", "-O1", "-fvisibility=hidden"),
                f'-DMODULE="{self._real}"',
                f'-DCONTROL="{control}"',
                *("-o", str(self.module), str(source), "-ldl"),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode:
            raise DeviceError(
                f"device faults: {Path(compiler).name} failed on shim.c",
                hint=done.stderr.strip()[-300:] or "the compiler printed nothing",
                code="compiler",
            )

    # ------------------------------------------------------------------ faults

    def set(
        self,
        name: str,
        *,
        function: str = "C_Sign",
        ms: int = 1000,
        n: int = 1,
        rv: int = 0x30,
        raw: bool = False,
        after: bool = False,
        label: str = "",
        attribute: int = 0x202,
    ) -> None:
        """Set the fault *name*; UsageError for an unknown fault or function."""
        _check(name)
        if function not in FUNCTIONS:
            raise UsageError(f"fault {name}: PKCS#11 has no function {function}")
        values = {
            "function": FUNCTIONS.index(function) + 1,
            "ms": ms,
            "n": n,
            "n+1": n + 1,
            "boolean": 2 if n else 1,
            "rv": rv,
            "raw": 3 if raw else 1,
            "after": 2 if after else 1,
            "attribute": attribute,
        }
        for member, value in _SETS[name].items():
            if value == "label":
                for at, word in enumerate(_words(label)):
                    self._put(f"label_{at}", word)
                continue
            number = values[value] if isinstance(value, str) else value
            if member in _EPOCHS:
                number = self._get(member) + 1
            elif member == "flags_missing":
                number |= self._get(member)
            self._put(member, number)

    def clear(self, name: str | None = None) -> None:
        """
        Clear the fault *name*, or all faults; UsageError for an unknown one.

        A fault that happens once (session-lost, …) cannot be undone.
        """
        if name is not None:
            _check(name)
        if self._get("removed") and name in (None, "token-removed"):
            self._put("sessions", self._get("sessions") + 1)
        ended = (*_SETS[name], *_SET_BY_SHIM.get(name, ())) if name else _MEMBERS
        for member in ended:
            if member not in _EPOCHS | _COUNTED:
                self._put(member, 0)

    # ------------------------------------------------------------------ counts

    def count(self, function: str) -> int:
        """How often *function* was called, by all processes together."""
        if function not in FUNCTIONS:
            raise UsageError(f"PKCS#11 has no function {function}")
        return self._at(FUNCTIONS.index(function))

    def sessions(self) -> int:
        """How many sessions are open, where one process alone uses the device."""
        return self._get("open_sessions")

    def calls(self) -> dict[str, int]:
        """All counts that are not zero."""
        counts = {name: self._at(number) for number, name in enumerate(FUNCTIONS)}
        return {name: count for name, count in counts.items() if count}

    def reset_counts(self) -> None:
        """Count from zero."""
        for number in range(len(FUNCTIONS)):
            self._write(number, 0)

    def _at(self, number: int) -> int:
        if self._memory is None:
            raise UsageError("faults: used outside its `with` block")
        return int(struct.unpack_from("q", self._memory, 8 * number)[0])

    def _write(self, number: int, value: int) -> None:
        if self._memory is None:
            raise UsageError("faults: used outside its `with` block")
        struct.pack_into("q", self._memory, 8 * number, value)

    def _get(self, member: str) -> int:
        return self._at(len(FUNCTIONS) + _MEMBERS.index(member))

    def _put(self, member: str, value: int) -> None:
        self._write(len(FUNCTIONS) + _MEMBERS.index(member), value)


def _check(name: str) -> None:
    if name not in NAMES:
        raise UsageError(
            f"fault {name}: there is no such fault",
            hint=did_you_mean(name, NAMES, ", ".join(NAMES)),
        )


def _words(label: str) -> tuple[int, ...]:
    """The first 32 bytes of *label*, as four members."""
    return struct.unpack("4q", label.encode()[:32].ljust(32, b"\0"))
