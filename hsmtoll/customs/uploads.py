"""
Upload of a document to a declaration, checked before anything is sent.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

import httpx

from hsmtoll import apis
from hsmtoll.customs.conversation import Receipt, Send
from hsmtoll.customs.errors import checked_response, object_of
from hsmtoll.errors import UsageError, sanitized
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from hsmtoll.customs.conversation import Conversation

__all__ = ["DOCUMENT_TYPES", "upload"]

#: https://toll.github.io/api/document/document-api-EN.html, as of January 2026.
DOCUMENT_TYPES: Final = (
    "invoice",
    "permits",
    "freight invoice",
    "proof of origin documentation",
    "waybill",
    "export documentation",
)
_MEDIA: Final = {
    "pdf": "application/pdf",
    "jpg": "image/jpeg",
    "png": "image/png",
    "txt": "text/plain",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}

#: Bytes. "10 MB" is documented; the smaller of MB and MiB is safe.
_LARGEST_FILE: Final = 10_000_000

_DECLARATION = re.compile(r"\d{9}-\d{8}-\d+")


def upload(declaration_id: str, name: str, content: bytes, document_type: str) -> Conversation:
    """
    Upload one document to one declaration. *name*: file name.

    All documented rules are checked before anything is sent (C22): UsageError. OutcomeUnknown if
    the response is lost.
    """
    api = apis.named("document")
    _check_upload(declaration_id, name, content, document_type)
    media = _MEDIA[name.rpartition(".")[2].lower()]
    # The order of the parts is fixed: metadata, then file (T24).
    form = httpx.Request(
        "POST",
        "https://unused/",
        files=[
            ("metadata", (None, json.dumps({"documentType": document_type}), "application/json")),
            ("file", (name, content, media)),
        ],
    )
    path = f"{api.base}/declaration-id/{declaration_id}/document"
    answer = yield Send("POST", path, form.read(), form.headers["content-type"])
    response = checked_response(answer, api, None)
    return Receipt(None, None, object_of(response) or {})


def _check_upload(declaration_id: str, name: str, content: bytes, document_type: str) -> None:
    if not _DECLARATION.fullmatch(declaration_id):
        raise UsageError(
            f"upload to {sanitized(declaration_id)}: that is not a declaration id",
            hint="<declarant, 9 digits>-<ddmmyyyy>-<sequence>, such as 123456789-01092026-1",
        )
    if document_type not in DOCUMENT_TYPES:
        raise UsageError(
            f"upload of type {sanitized(document_type)}: Customs knows no such type",
            hint=did_you_mean(document_type, DOCUMENT_TYPES, f"types: {', '.join(DOCUMENT_TYPES)}"),
        )
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    if extension not in _MEDIA:
        raise UsageError(
            f"upload of {sanitized(name)}: Customs takes {', '.join(_MEDIA)}",
            hint="doc and xls are no longer taken; save as docx, xlsx or pdf",
        )
    if not 0 < len(content) <= _LARGEST_FILE:
        raise UsageError(
            f"upload of {sanitized(name)}: {len(content)} bytes, 1 to {_LARGEST_FILE} are taken",
            hint="split what is larger",
        )
