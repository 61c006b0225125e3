"""
A device with the PKCS#11 module in worker processes: a hang is killed, a crash is contained.

    caller ── free child? ── call ──► worker: InProcessDevice ── module
                 │             │  ◄── PIN request
                 │             └─ no answer before the deadline: killed, device-hung
                 └─ none before the deadline: device-busy
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import DeviceError, PinIncorrect, PinNotTried, sanitized
from hsmtoll.fork import after_fork, notice_fork
from hsmtoll.hsm.child import WorkerProcess
from hsmtoll.hsm.codec import encode, hints
from hsmtoll.hsm.device import Device
from hsmtoll.hsm.pipe import Opening
from hsmtoll.hsm.recovery import SIGNING, CircuitBreaker
from hsmtoll.hsm.signatures import Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from hsmtoll.hsm.device import DeviceSettings
    from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, Signature, Stored, StoredCertificate
    from hsmtoll.hsm.pin import Pin, PinSource
    from hsmtoll.hsm.pin_log import PinLog, TokenUser
    from hsmtoll.hsm.pipe import Reply
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.jws import RsaPublicKey, SigningInput

__all__ = ["WorkerDevice"]

#: Seconds to wait for the start of another worker before starting one concurrently.
_SERIAL_START_TIMEOUT: Final = 5.0
#: Seconds for generating a key in addition to the deadline: small devices take minutes.
_KEY_GENERATION: Final = 600.0


class WorkerDevice:
    """
    As `hsmtoll.hsm.device.Device`, with *workers* child processes. Each call may take
    *settings.deadline* seconds, not counting the reading of a PIN.

    In addition to a device's errors it raises DeviceError ``device-hung`` after the deadline and
    ``module-crashed`` if the child died; the next call starts a new child. PINs are read in this
    process and sent when the child requests them, an accepted one again to the next child. The
    child writes the PIN log; its log records are logged here. *program* is the module that a child
    runs, *rules* its parameters for what it may sign.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        *,
        pin: PinSource | None,
        signing_pin: PinSource | None = None,
        pin_log: PinLog,
        workers: int = 1,
        program: str = "hsmtoll.hsm.worker",
        rules: dict[str, Any] | None = None,
        boot: Callable[[], float] = time.monotonic,
    ) -> None:
        self.uri = settings.uri
        self._name = sanitized(settings.uri)
        signing_pin = signing_pin if signing_pin is not pin else None
        self._sources = {"user": pin, "signing": signing_pin}
        self._pins: dict[str, Pin] = {}
        self._opening = Opening(
            settings=settings,
            pin=pin is not None,
            signing_pin=signing_pin is not None,
            pin_log=pin_log.directory and pin_log.directory.absolute(),
            pin_log_optional=pin_log.optional,
            rules=rules,
        )
        self._program = program
        self._deadline = settings.deadline
        self._workers = workers
        self._breaker = CircuitBreaker(settings.uri, boot=boot)
        self._verifier = Verifier(self._name)
        self._closings = 0
        #: As `Device.generation`.
        self.generation = 0
        self._last: Reply | None = None
        self._children: list[WorkerProcess] = []
        self._create_workers()
        after_fork(self._create_workers)

    def _create_workers(self) -> None:
        # After a fork the children and waiting callers are those of the parent process.
        for child in self._children:
            child.abandon()
        self._reading = threading.Lock()
        self._starting = threading.Lock()
        # Guards the free children; notified when one is returned.
        self._changed = threading.Condition()
        self._children = [
            WorkerProcess(self._opening, program=self._program, deadline=self._deadline)
            for _ in range(self._workers)
        ]
        self._free = list(self._children)
        #: Number of callers that are waiting for a child.
        self.waiting = 0

    def __repr__(self) -> str:
        return f"WorkerDevice({self._name})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pin_state(self) -> str | None:
        """As `Device.pin_state`, of the child that answered last."""
        return self._last.pin_state if self._last is not None else None

    @property
    def pin_accepted(self) -> bool:
        """As `Device.pin_accepted`, of the child that answered last."""
        return self._last is not None and self._last.pin_accepted

    # ------------------------------------------------------------------ certificates, key, signing

    def certificates(
        self, *, near: bool = False, force_login: bool = False
    ) -> tuple[StoredCertificate, ...]:
        """As `Device.certificates`."""
        found: tuple[StoredCertificate, ...] = self._ask(
            "reading certificates", "certificates", near=near, force_login=force_login
        )
        return found

    def other_certificates(self) -> tuple[StoredCertificate, ...]:
        """As `Device.other_certificates`."""
        found: tuple[StoredCertificate, ...] = self._ask(
            "reading certificates of other devices", "other_certificates"
        )
        return found

    def key(self, *, candidates: Iterable[RsaPublicKey] = ()) -> KeyFacts:
        """As `Device.key`."""
        facts: KeyFacts = self._ask("looking for the key", "key", candidates=tuple(candidates))
        return facts

    def sign(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> Signature:
        """As `Device.sign`; the child's signature is verified here."""
        offered = tuple(candidates)
        made = self._ask(SIGNING, "sign", alg=alg, unsigned=unsigned, candidates=offered)
        return self._verifier.verified(alg, unsigned, made, offered)

    def self_test(
        self, alg: str, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> RsaPublicKey | None:
        """As `Device.self_test`."""
        by: RsaPublicKey | None = self._ask(
            SIGNING, "self_test", alg=alg, candidates=tuple(candidates)
        )
        return by

    def sign_request(self, alg: str, info: bytes, *, public: RsaPublicKey) -> bytes:
        """As `Device.sign_request`."""
        return bytes(self._ask(SIGNING, "sign_request", alg=alg, info=info, public=public))

    # ------------------------------------------------------------------ administration

    def generate(
        self, *, bits: int, label: str, key_id: bytes | None, always_authenticate: bool
    ) -> KeyUri:
        """As `Device.generate`."""
        made: KeyUri = self._ask(
            "generating a key",
            "generate",
            more=_KEY_GENERATION,
            bits=bits,
            label=label,
            key_id=key_id,
            always_authenticate=always_authenticate,
        )
        return made

    def private_keys(self) -> tuple[KeyFacts, ...]:
        """As `Device.private_keys`."""
        found: tuple[KeyFacts, ...] = self._ask("reading the keys", "private_keys")
        return found

    def store(self, certificates: tuple[tuple[bytes, str, bytes], ...], *, hint: str) -> Stored:
        """As `Device.store`."""
        done: Stored = self._ask(
            "writing certificates", "store", certificates=certificates, hint=hint
        )
        return done

    def inspect(self, *, log_in: bool = True) -> ModuleFacts:
        """As `Device.inspect`."""
        facts: ModuleFacts = self._ask("inspecting the module", "inspect", log_in=log_in)
        return facts

    def token_users(self) -> tuple[TokenUser, ...]:
        """As `Device.token_users`."""
        found: tuple[TokenUser, ...] = self._ask("looking for devices", "token_users")
        return found

    def close(self) -> None:
        """Log out and end the children; a busy one after its answer."""
        notice_fork()
        self._closings += 1
        with self._changed:
            idle, self._free = self._free, []
        for child in idle:
            child.end()
            # Return it: later calls start its process again.
            self._return(child)
        self._pins.clear()

    # ------------------------------------------------------------------ children

    def _ask(self, doing: str, do: str, *, more: float = 0.0, **arguments: Any) -> Any:
        call = {"do": do, **{name: encode(each) for name, each in arguments.items()}}
        result_type = hints(getattr(Device, do))["return"]
        with self._breaker.guard(doing):
            reply, answer = self._result_of(f"{doing} ({self._name})", call, result_type, more)
            if reply.error is not None:
                if isinstance(reply.error, PinIncorrect | PinNotTried):
                    self._pins.clear()
                raise reply.error
        return answer

    def _result_of(
        self, doing: str, call: dict[str, Any], result_type: Any, more: float
    ) -> tuple[Reply, Any]:
        closings = self._closings
        child = self._acquire(doing)
        # SoftHSM rewrites token files at login: workers that start concurrently may not find it.
        starting = not child.running and self._starting.acquire(timeout=_SERIAL_START_TIMEOUT)
        try:
            reply, answer = child.ask(call, result_type, doing=doing, pins=self._read, more=more)
            self._last = reply
            if reply.generation != child.generation:
                child.generation = reply.generation
                self.generation += 1
        except BaseException:
            # An interrupted exchange of messages cannot be continued.
            child.kill()
            raise
        finally:
            if starting:
                self._starting.release()
            if closings != self._closings:
                child.end()
            self._return(child)
        for name, level, message in reply.log:
            logging.getLogger(name).log(level, "%s", message)
        return reply, answer

    def _acquire(self, doing: str) -> WorkerProcess:
        with self._changed:
            self.waiting += 1
            try:
                if self._changed.wait_for(lambda: self._free, self._deadline):
                    return self._free.pop()
            finally:
                self.waiting -= 1
        raise DeviceError(
            f"{doing}: no process of the device was free within {self._deadline:g} s",
            hint="HSMTOLL_HOST__WORKERS sets their number.",
            code="device-busy",
            signed=False,
            scope="attempt",
        )

    def _return(self, child: WorkerProcess) -> None:
        with self._changed:
            self._free.append(child)
            self._changed.notify()

    def _read(self, user: str, device: str) -> Pin:
        # Serialised: a single prompt for all children.
        with self._reading:
            pin, source = self._pins.get(user), self._sources.get(user)
            if pin is None and source is not None:
                pin = self._pins[user] = source.read(device=device)
        if pin is None:
            raise DeviceError(
                "the device's process requested a PIN without a source", code="worker"
            )
        return pin
