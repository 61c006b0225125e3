"""
What the modules of each maker need, by file name: the configuration with which they find their
device, and the tool that generates a key there. Data; `hsmtoll/docs/devices.md` describes each.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MAKERS", "Maker", "maker_of"]


class Maker(NamedTuple):
    """
    *files*: pattern of file names. *name*: of the product. *needs*: the configuration that the
    module reads at its start; follows the word "see". *service*: what must run or be reachable.
    *tool*: the command that generates a key.
    """

    files: str
    name: str
    needs: str
    service: str = ""
    tool: str = ""


_PCSC: Final = "pcscd runs and the reader and the card are in place"
_HSM: Final = "the HSM can be reached over the network"

MAKERS: Final = (
    Maker(
        "libsofthsm2",
        "SoftHSM",
        "SOFTHSM2_CONF, and who may read the directory named there",
        tool="softhsm2-util and pkcs11-tool",
    ),
    Maker(
        "yubihsm_pkcs11",
        "YubiHSM 2",
        "YUBIHSM_PKCS11_CONF (a file with connector = …)",
        "yubihsm-connector runs and the YubiHSM is plugged in",
        "yubihsm-shell",
    ),
    Maker(
        "libcs_pkcs11_R[23]|cs_pkcs11_R[23]|libcs2_pkcs11",
        "Utimaco",
        "CS_PKCS11_R3_CFG (CS_PKCS11_R2_CFG for R2)",
        _HSM,
        "p11tool2",
    ),
    Maker(
        "libCryptoki2(_64)?|libCryptoki2\\.\\d|libshim|cklog2",
        "Thales Luna",
        "ChrystokiConfigurationPath (the directory of Chrystoki.conf)",
        _HSM,
        "cmu generatekeypair",
    ),
    Maker(
        "libcryptoki|libctcryptoki|libctsw|cryptoki",
        "SafeNet ProtectToolkit",
        "ET_PTKC_… and ET_HSM_NETCLIENT_SERVERLIST",
        _HSM,
        "ctkmu",
    ),
    Maker(
        "libnethsm_pkcs11|nethsm_pkcs11|libnethsm",
        "NetHSM",
        "P11NETHSM_CONFIG_FILE",
        _HSM,
        "nitropy nethsm generate-key",
    ),
    Maker(
        "libtpm2_pkcs11",
        "tpm2-pkcs11",
        "TPM2_PKCS11_STORE, TPM2_PKCS11_TCTI and who may use the TPM",
        "the TPM and tpm2-abrmd, if it is used, are there",
        "tpm2_ptool addkey",
    ),
    Maker(
        "libkmsp11|kmsp11",
        "Google Cloud KMS",
        "KMS_PKCS11_CONFIG (a file of this account alone)",
        "Google Cloud KMS can be reached and its credentials are good",
        "gcloud kms keys create",
    ),
    Maker(
        "libcknfast|cknfast",
        "Entrust nShield",
        "CKNFAST_… in the environment or in /opt/nfast/cknfastrc",
        "nFast's hardserver runs and the module is operational",
        "generatekey pkcs11",
    ),
    Maker(
        "libvault-pkcs11|vault-pkcs11-provider|libvault.*pkcs11",
        "HashiCorp Vault",
        "VAULT_KMIP_CONFIG (vault-pkcs11.hcl)",
        "the KMIP listener of Vault can be reached",
        "vault",
    ),
    Maker(
        "libpkcs11-proxy|pkcs11-proxy",
        "pkcs11-proxy",
        "PKCS11_PROXY_SOCKET (tcp://HOST:PORT)",
        "pkcs11-daemon runs there",
        "the tool of the module behind it",
    ),
    Maker("libsoftokn3", "NSS", "NSS_LIB_PARAMS (configdir='sql:/DIRECTORY')", tool="certutil"),
    Maker(
        "libcloudhsm_pkcs11",
        "AWS CloudHSM",
        "/opt/cloudhsm/etc/cloudhsm-pkcs11.cfg (configure-pkcs11)",
        _HSM,
        "cloudhsm-cli key generate-asymmetric-pair",
    ),
    Maker(
        "libprimusP11",
        "Securosys Primus",
        "PRIMUS_CONFIG or /etc/primus/primus.cfg",
        _HSM,
        "ppin and the HSM's own tool",
    ),
    Maker(
        "libopencryptoki|PKCS11_API",
        "opencryptoki",
        "/etc/opencryptoki/opencryptoki.conf, group pkcs11",
        "pkcsslotd runs",
        "p11sak generate-key",
    ),
    Maker(
        "p11-kit-client",
        "p11-kit",
        "P11_KIT_SERVER_ADDRESS",
        "`p11-kit server` runs there",
        "the tool of the module behind it",
    ),
    Maker(
        "p11-kit-proxy",
        "p11-kit",
        "/etc/pkcs11/modules and ~/.config/pkcs11/modules",
        tool="the tool of the module behind it",
    ),
    Maker(
        "libykcs11|ykcs11",
        "YubiKey (ykcs11)",
        "YKCS11_DBG=1 for its log",
        _PCSC,
        "ykman piv keys generate",
    ),
    Maker("(onepin-)?opensc-pkcs11", "OpenSC", "OPENSC_CONF", _PCSC, "pkcs11-tool --keypairgen"),
    Maker(
        "libsc-hsm-pkcs11|sc-hsm-pkcs11",
        "SmartCard-HSM",
        "its own documents",
        _PCSC,
        "sc-hsm-tool and pkcs11-tool",
    ),
    Maker(
        "libeToken|libeTPkcs11|libIDPrimePKCS11|IDPrimePKCS11",
        "SafeNet Authentication Client",
        "/etc/eToken.conf",
        _PCSC,
        "SafeNet Authentication Client Tools",
    ),
    Maker(
        "libbit4xpki|libbit4ipki|libbit4opki",
        "Bit4id",
        "its own documents",
        _PCSC,
        "the card's own tool",
    ),
)


def maker_of(module: Path) -> Maker | None:
    """The maker of *module*, by its file name up to ``.so``; None if unknown."""
    stem = module.name.partition(".so")[0].removesuffix(".dll").removesuffix(".dylib")
    return next((each for each in MAKERS if re.fullmatch(each.files, stem)), None)
