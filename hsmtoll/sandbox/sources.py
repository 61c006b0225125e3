"""
Public pages that the rules of the sandbox cite.
"""

from __future__ import annotations

from typing import Final

# Pages of Digdir, which runs Maskinporten.
_DIGDIR: Final = "https://docs.digdir.no/docs/Maskinporten/maskinporten_"
GRANT: Final = f"{_DIGDIR}protocol_jwtgrant"
TOKENS: Final = f"{_DIGDIR}protocol_token"
ERRORS: Final = f"{_DIGDIR}feilsoking"
ESEALS: Final = f"{_DIGDIR}func_european_eseals"
METADATA: Final = f"{_DIGDIR}func_wellknown"
AUDIENCE: Final = f"{_DIGDIR}func_audience_restricted_tokens"
PERSON: Final = f"{_DIGDIR}func_pid_restricted_tokens"
SYSTEM_USER: Final = f"{_DIGDIR}func_systembruker"
SCOPES: Final = "https://docs.digdir.no/docs/idporten/oidc/oidc_protocol_scope"

# Pages of Customs.
_TOLL: Final = "https://toll.github.io/api/"
INTEGRATION: Final = f"{_TOLL}maskinporten/teknisk-integrasjon-EN.html"
WHAT_IS: Final = f"{_TOLL}maskinporten/hva-er-maskinporten-EN.html"
ORDER_NORWEGIAN: Final = f"{_TOLL}maskinporten/bestille-sertifikat-norsk-EN.html"
SYNCHRONOUS: Final = f"{_TOLL}mo/synkrone-valideringsfeil-EN.html"
ASYNCHRONOUS: Final = f"{_TOLL}mo/asynkrone-valideringsfeil-EN.html"
QUERIES: Final = f"{_TOLL}mo/beskrivelse-av-sporre-api-EN.html"
RELATION: Final = f"{_TOLL}mo/beskrivelse-av-koblings-api-EN.html"
CHANGES: Final = f"{_TOLL}mo/kobling-oppdatering-og-sletting-EN.html"
ROUTING: Final = f"{_TOLL}mo/fremlegging-og-kontrolldirigering-EN.html"
EXAMPLES: Final = f"{_TOLL}mo/mo-eksempler-EN.html"
PRESENTATION: Final = f"{_TOLL}ics2/ics2-forsendelser-EN.html"
UPLOAD: Final = f"{_TOLL}document/document-api-EN.html"
#: The road API v1 as it was rendered in 2022.
ROAD_2022: Final = "https://github.com/toll/toll.github.io/tree/98d26b6"

# Where something was observed.
#: Digdir's validator of Norwegian enterprise certificates.
VALIDATOR: Final = "https://github.com/felleslosninger/idporten-seid2-certificate-validator-lib"
#: A client that runs against Maskinporten and Customs, with logs of 2022 and 2023.
CLIENT_CODE: Final = "https://github.com/SystemaAS/syjservicestn-expft"
#: A report of what Maskinporten's server checks of iat and exp.
SERVER_LIMITS: Final = "https://github.com/Altinn/altinn-studio/issues/19603"
ETSI: Final = "https://www.etsi.org/deliver/etsi_en/319400_319499/"
