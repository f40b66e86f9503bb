"""HTTP answers, and the parsing of error answers: status, error body and `Retry-After`.

The functions have no side effects. No error quotes a body, except the message of an error envelope:
shortened, without control characters, and without tokens. See workpool/docs/protocol.md, "Errors".
"""

from __future__ import annotations

import http
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import orjson
from yarl import URL

from workpool.errors import (
    ConflictError,
    ControlPlaneError,
    PreconditionError,
    RefusedError,
    TransientError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")

RETRY_AFTER_MAX_SECONDS: Final = 300.0
"""Largest `Retry-After` that is obeyed, so that one header cannot stop a worker for long."""
SUCCESS: Final = range(200, 300)
_REDIRECTS: Final = range(300, 400)
BEGINNING_BYTES: Final = 4096
MESSAGE_MAX: Final = 300
_WORD_MAX: Final = 64
_ORIGIN_MAX: Final = 128
_SECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?").fullmatch
_CLIENT_ERRORS: Final = range(400, 500)
_REFUSED_STATUSES: Final = frozenset({*http.HTTPStatus} & {*_CLIENT_ERRORS} - {408, 425, 429})
"""The statuses that show that the request is wrong, so that no retry can succeed.

Any other status may pass by itself, also one that HTTP does not define or that no request asks for,
such as 101.
"""
_OWN_LABEL: Final = frozenset({304, 400, 401, 403, 404, 409, 412, 429})


class OversizedBody(NamedTuple):
    """A body that exceeds the size limit; only its first `BEGINNING_BYTES` are stored."""

    beginning: bytes


class Response(NamedTuple):
    """An HTTP answer. The body is complete unless it is `OversizedBody`."""

    status: int
    headers: Mapping[str, str]
    body: bytes | OversizedBody


CODES: Final[Mapping[int, str]] = {
    status: str(status) if status in _OWN_LABEL else f"{status // 100}xx"
    for status in (*SUCCESS, 304, *range(400, 600))
}
"""The label of each status in the metrics; a status that is missing here is counted as "error"."""


_wants_tls: Final = re.compile(rb"(?i)HTTP request[a-z ]{1,30}HTTPS (port|server)").search
"""Whether the body is that of a server (Go's, nginx) that expected TLS and got plain HTTP."""


def parse_error_answer(op: str, answer: Response, *secrets: str) -> ControlPlaneError:
    """Return the error for a status outside `SUCCESS`; its message contains no `secrets`."""
    status = answer.status
    envelope = _parse_error_envelope(answer.body)
    message = _sanitize_error_text(
        envelope.get("message"), secrets, MESSAGE_MAX
    ) or _format_status_phrase(status)
    if isinstance(answer.body, bytes) and _wants_tls(answer.body):
        message = f"{message}: the port speaks TLS: base_url must begin with https://"
    if status not in _REFUSED_STATUSES:
        if status in _REDIRECTS:
            message = _describe_redirect(answer.headers.get("Location", ""), secrets)
        return TransientError(
            op,
            status,
            message,
            reason="throttled" if status == http.HTTPStatus.TOO_MANY_REQUESTS else "server_error",
            retry_after=parse_retry_after(answer.headers),
        )
    kind = _REFUSALS.get(status, RefusedError)
    return kind(
        op,
        status,
        message,
        error_type=_sanitize_error_text(envelope.get("type"), secrets, _WORD_MAX),
        param=_sanitize_error_text(envelope.get("param"), secrets, _WORD_MAX),
    )


def _describe_redirect(location: str, secrets: Sequence[str]) -> str:
    """Describe a redirect. The client follows none, since the new host would receive the token.

    The text has only scheme, host and port of the address, since the rest may contain credentials.
    """
    try:
        # `URL.origin` converts the host to lower case, and a secret in it too. So look for the
        # secrets in lower case.
        lower = [secret.lower() for secret in secrets]
        origin = _sanitize_error_text(str(URL(location).origin()).lower(), lower, _ORIGIN_MAX)
    # The header `Location` is a relative path, or not a URL.
    except ValueError:
        origin = None
    to = f" to {origin}" if origin else ""
    return f"redirected{to}: base_url is not the control plane's own, or a proxy intervenes"


_REFUSALS: Final[Mapping[int, type[ControlPlaneError]]] = {
    409: ConflictError,
    412: PreconditionError,
}


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait that `Retry-After` asks for, at most 300.

    Return None if the header is missing or malformed, or if its time is in the past.
    """
    value = headers.get("Retry-After", "").strip()
    if _SECONDS(value):
        return min(float(value), RETRY_AFTER_MAX_SECONDS)
    until = _parse_date(value)
    if until is None:
        return None
    # Use the server's clock if the answer has a `Date`: a worker whose own clock is an hour off
    # would otherwise wait for an hour, or not at all.
    seconds = (until - (_parse_date(headers.get("Date", "")) or datetime.now(UTC))).total_seconds()
    return min(seconds, RETRY_AFTER_MAX_SECONDS) if seconds > 0 else None


def _parse_date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _parse_error_envelope(body: bytes | OversizedBody) -> dict[str, Any]:
    """Return the object `error` of an error's body; empty if the body has no such object."""
    try:
        envelope = orjson.loads(b"" if isinstance(body, OversizedBody) else body)
    except orjson.JSONDecodeError:
        return {}
    error = envelope.get("error") if isinstance(envelope, dict) else None
    return error if isinstance(error, dict) else {}


def _sanitize_error_text(text: object, secrets: Sequence[str], limit: int) -> str | None:
    """Return an error's text for a log: without secrets, on one line, at most `limit` characters.

    Secrets are removed before the text is shortened, which could cut a secret in two.

    Characters that are not printable, and runs of spaces, become one space.
    """
    if not isinstance(text, str):
        return None
    # Replace the longest secrets first: otherwise, if one is a part of another, the rest of the
    # longer one would stay in the text.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "[token]")
    shown = "".join(each if each.isprintable() else " " for each in text[: 4 * limit])
    line = " ".join(shown.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _format_status_phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "unknown status"
