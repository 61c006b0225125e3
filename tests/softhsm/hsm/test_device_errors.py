"""What a module answers, and which of our errors it becomes."""

from __future__ import annotations

import inspect
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from pkcs11 import exceptions as p11

from hsmtoll.errors import ConfigurationError, DeviceError, HsmTollError, PinIncorrect, PinNotTried
from hsmtoll.hsm.codes import MEANING, NOT_TRIED, REFUSED, recoverable, translated
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.makers import MAKERS
from hsmtoll.hsm.module import check_path
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.return_codes import RETURN_CODES
from hsmtoll.hsm.uri import KeyUri

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.softhsm.conftest import DeviceSoftHsm

CLASSES = [
    kind
    for _, kind in inspect.getmembers(p11, inspect.isclass)
    if issubclass(kind, p11.PKCS11Error)
]


def test_the_table_knows_every_class_and_no_other() -> None:
    assert len(CLASSES) > 60
    assert set(MEANING) == set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_answer_becomes_one_line_with_its_name_in_it(kind: type[Exception]) -> None:
    error = translated(kind("two\nlines \x1b[31m"), "signing")
    assert str(error).startswith("signing: ")
    assert kind.__name__ in str(error)
    assert len(str(error).splitlines()) == 1
    assert "\x1b" not in str(error)
    assert error.code
    assert error.exit_code in {20, 21, 30}


def test_an_answer_of_a_later_version_is_a_device_error_with_its_name() -> None:
    class Unheard(p11.PKCS11Error):
        pass

    error = translated(Unheard(), "signing")
    assert isinstance(error, DeviceError)
    assert "Unheard" in str(error)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_answer_has_a_hint_that_names_no_fault_of_hsmtoll(kind: type[Exception]) -> None:
    hint = translated(kind(), "signing").hint
    assert hint
    assert hint[0].islower() or hint[0] == "`"
    assert not hint.endswith(".")
    assert "report it" not in hint


#: What python-pkcs11 says for codes that it has no class for; its map is not Python.
UNCLASSED = {
    0x103: "User type invalid. Should never see this.",
    0x150: "Buffer was too small. Should never see this.",
    0x190: "Initialisation error (not initialized). Should never see this.",
    0x191: "Initialisation error (already initialized). Should never see this.",
    0xB4: "Parallel not supported. Should never see this.",
}


@pytest.mark.parametrize("code", sorted(RETURN_CODES), ids=hex)
def test_every_code_without_a_class_is_named_and_says_who_must_act(code: int) -> None:
    text = UNCLASSED.get(code, f"Unmapped error code {code:#x}")
    error = translated(p11.PKCS11Error(text), "signing")
    assert "CKR_" in str(error)
    assert f"({code:#x})" in str(error)
    assert error.hint == RETURN_CODES[code].advice
    for theirs in ("Unmapped", "Should never see", "PKCS11Error"):
        assert theirs not in str(error)


def test_a_makers_unknown_code_is_hexadecimal_and_the_makers_own() -> None:
    error = translated(p11.PKCS11Error("Unmapped error code 0x8badf00d"), "signing")
    assert str(error) == "signing: the module answered 0x8badf00d, a code of the maker's own"
    assert "maker" in (error.hint or "")
    # One below the makers' range is nobody's.
    other = translated(p11.PKCS11Error("Unmapped error code 0x7badf00d"), "signing")
    assert str(other) == "signing: the module answered 0x7badf00d"


def test_what_does_not_change_by_asking_again_is_not_asked_again() -> None:
    for code in (0x68, 0x1B, 0xA, 0x80000030, 0x80000102):
        assert not recoverable(p11.PKCS11Error(f"Unmapped error code {code:#x}"))
    assert not recoverable(p11.PKCS11Error(UNCLASSED[0x103]))
    # The controls: an HSM that was restarted, one that cannot be reached, one that nobody knows.
    for code in (0x80000384, 0x8000001F, 0x8BADF00D):
        assert recoverable(p11.PKCS11Error(f"Unmapped error code {code:#x}"))
    assert recoverable(p11.PKCS11Error(UNCLASSED[0x190]))


def test_bad_arguments_are_the_form_of_the_pin_in_a_login_alone() -> None:
    at_login = translated(p11.ArgumentsBad(), "the PIN", login=True)
    assert at_login.code == "pin-form"
    # Nobody looked at the PIN, and nothing is remembered of it.
    assert isinstance(at_login, DeviceError)
    for maker in ("YubiHSM", "CloudHSM", "user:password", "PIN_PROMPT=pinpad", "length"):
        assert maker in (at_login.hint or "")
    assert translated(p11.ArgumentsBad(), "signing").code == "module-refused"


@pytest.mark.parametrize(
    ("file", "variable"),
    [
        ("yubihsm_pkcs11.so", "YUBIHSM_PKCS11_CONF"),
        ("libcs_pkcs11_R3.so", "CS_PKCS11_R3_CFG"),
        ("libCryptoki2_64.so", "ChrystokiConfigurationPath"),
        ("libCryptoki2.so", "ChrystokiConfigurationPath"),
        ("libnethsm_pkcs11.so", "P11NETHSM_CONFIG_FILE"),
        ("libtpm2_pkcs11.so.1.9.0", "TPM2_PKCS11_STORE"),
        ("libkmsp11.so", "KMS_PKCS11_CONFIG"),
        ("libcknfast.so", "CKNFAST_"),
        ("libcknfast.so", "cknfastrc"),
        ("libvault-pkcs11.so", "VAULT_KMIP_CONFIG"),
        ("libpkcs11-proxy.so", "PKCS11_PROXY_SOCKET"),
        ("libsoftokn3.so", "NSS_LIB_PARAMS"),
        ("libsofthsm2.so", "SOFTHSM2_CONF"),
    ],
)
def test_a_module_that_does_not_start_is_told_its_own_variable(
    tmp_path: Path, file: str, variable: str
) -> None:
    module = dead_module(tmp_path / file)
    error = refusal(module, tmp_path)
    assert error.code == "module-load"
    assert "0x80000384" in str(error)
    assert variable in (error.hint or "")
    assert ("SOFTHSM2_CONF" in (error.hint or "")) is (file == "libsofthsm2.so")


def test_a_module_of_an_unknown_maker_is_told_no_others_variable(tmp_path: Path) -> None:
    hint = refusal(dead_module(tmp_path / "acme_p11.so"), tmp_path).hint or ""
    assert "devices.md" in hint
    assert not any(each.needs in hint for each in MAKERS)


def dead_module(path: Path) -> Path:
    """A module whose C_Initialize answers 0x80000384."""
    source = path.with_suffix(".c")
    source.write_text(
        "static unsigned long no(void *a) { return 0x80000384UL; }\n"
        "static struct { unsigned char v[2]; void *f[68]; } list = {{2, 40}, {no}};\n"
        "unsigned long C_GetFunctionList(void **out) { *out = &list; return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


def test_nothing_about_a_pin_is_ever_recoverable() -> None:
    about_pins = [k for k in CLASSES if "Pin" in k.__name__ or k in (*REFUSED, p11.PinLocked)]
    assert len(about_pins) >= 7
    for kind in about_pins:
        assert not recoverable(kind())
        assert not recoverable(translated(kind(), "Logging in"))
    for kind in (p11.DeviceError, p11.DeviceRemoved, p11.GeneralError, p11.SessionHandleInvalid):
        assert recoverable(kind())


def test_a_refusal_and_a_pin_that_was_not_looked_at_are_never_the_same() -> None:
    assert not set(REFUSED) & set(NOT_TRIED)
    assert isinstance(translated(p11.PinIncorrect(), "x"), PinIncorrect)
    assert isinstance(translated(p11.PinLocked(), "x"), PinNotTried)


def refusal(module: Path, state: Path) -> HsmTollError:
    device = InProcessDevice(
        DeviceSettings(module, KeyUri.parse("pkcs11:")), pin=None, pin_log=PinLog(state)
    )
    with pytest.raises(HsmTollError) as caught:
        device.certificates()
    assert "\n" not in str(caught.value)
    assert str(module) in str(caught.value)
    return caught.value


def test_a_path_that_is_no_module_is_a_configuration_error(tmp_path: Path) -> None:
    text = tmp_path / "relative.so"
    for path, message in (
        (tmp_path / "none.so", "does not exist"),
        (tmp_path, "is not a file"),
        (text.relative_to("/"), "is not an absolute path"),
    ):
        error = refusal(path, tmp_path)
        assert isinstance(error, ConfigurationError)
        assert error.code == "module-path"
        assert message in str(error)


def test_a_file_that_is_no_library_and_a_library_that_is_not_pkcs11_are_device_errors(
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.so"
    text.write_text("hello")
    other = tmp_path / "other.so"
    shutil.copy("/lib/x86_64-linux-gnu/libz.so.1", other)
    for path, message in ((text, "cannot be loaded"), (other, "but not of PKCS#11")):
        path.chmod(0o644)
        error = refusal(path, tmp_path)
        assert isinstance(error, DeviceError)
        assert error.code == "module-load"
        assert message in str(error)


def test_a_module_that_others_can_change_is_refused_parents_included(
    tmp_path: Path, device_softhsm: DeviceSoftHsm
) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    module = folder / "m.so"
    shutil.copy(device_softhsm.module, module)
    for place in (module, folder):
        before = place.stat().st_mode & 0o777
        place.chmod(before | 0o002)
        error = refusal(module, tmp_path)
        assert isinstance(error, ConfigurationError)
        assert "can be changed by others" in str(error)
        place.chmod(before)
    link = tmp_path / "link.so"
    link.symlink_to(module)
    module.chmod(0o666)
    assert "can be changed by others" in str(refusal(link, tmp_path))
    module.chmod(0o644)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "link.so").symlink_to(module)
    link.unlink()
    link.symlink_to(shared / "link.so")
    shared.chmod(0o777)
    assert f"can be changed by others ({shared})" in str(refusal(link, tmp_path))


def link_beside(folder: Path) -> Path:
    """A link in *folder* to the module."""
    (folder / "m.so").symlink_to("../maker/m.so")
    return folder / "m.so"


def link_to_a_link(folder: Path) -> Path:
    """A link in a directory of ours, to the link in *folder*."""
    beside = folder.parent / "first.so"
    beside.symlink_to(link_beside(folder))
    return beside


def link_to_a_directory(folder: Path) -> Path:
    """A path through a link of ours to *folder*, and one there to the module's directory."""
    (folder / "in").symlink_to("../maker", target_is_directory=True)
    (folder.parent / "current").symlink_to(folder, target_is_directory=True)
    return folder.parent / "current" / "in" / "m.so"


@pytest.mark.parametrize("lead", [link_beside, link_to_a_link, link_to_a_directory])
def test_a_link_that_others_can_change_is_refused_wherever_it_stands_on_the_way(
    tmp_path: Path, lead: Callable[[Path], Path]
) -> None:
    for name in ("maker", "shared"):
        (tmp_path / name).mkdir(mode=0o755)
    (tmp_path / "maker" / "m.so").touch(mode=0o644)
    module = lead(tmp_path / "shared")
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(ConfigurationError, match="can be changed by others") as caught:
        check_path(module)
    assert str(tmp_path / "shared") in str(caught.value)
    # The same way is taken where nobody else can write, or cannot take what is ours away.
    for mode in (0o755, 0o1777):
        (tmp_path / "shared").chmod(mode)
        check_path(module)


def test_the_same_module_is_taken_where_only_this_user_can_change_it(
    tmp_path: Path, device_softhsm: DeviceSoftHsm
) -> None:
    module = tmp_path / "good.so"
    shutil.copy(device_softhsm.module, module)
    module.chmod(0o644)
    link = tmp_path / "link.so"
    link.symlink_to("good.so")
    for each in (module, link):
        device_softhsm.python(
            "import sys\nfrom pathlib import Path\n"
            "from hsmtoll.hsm.module import open_module\n"
            "open_module(Path(sys.argv[2]))",
            str(each),
        )


def test_a_module_that_will_not_start_is_said_with_where_to_look(
    device_softhsm: DeviceSoftHsm,
) -> None:
    device_softhsm.python(
        "import os, sys\nfrom pathlib import Path\n"
        "os.environ['SOFTHSM2_CONF'] = '/nowhere'\n"
        "from hsmtoll.errors import DeviceError\n"
        "from hsmtoll.hsm.module import open_module\n"
        "try: open_module(Path(sys.argv[1]))\n"
        "except DeviceError as error: assert 'GeneralError' in str(error), error\n"
        "else: sys.exit('it started')"
    )


def test_two_paths_of_one_module_are_one_module(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    link = tmp_path / "link.so"
    link.symlink_to(device_softhsm.module)
    device_softhsm.python(
        "import sys\nfrom pathlib import Path\n"
        "from hsmtoll.hsm.module import open_module\n"
        "assert open_module(Path(sys.argv[1])) is open_module(Path(sys.argv[2]))",
        str(link),
    )
