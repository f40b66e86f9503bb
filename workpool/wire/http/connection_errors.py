"""Errors of requests without an answer: their classes, and the hints in their messages."""

from __future__ import annotations

import errno
from typing import Final

import aiohttp

from workpool.errors import ControlPlaneError, RefusedError, TransientError
from workpool.wire.http.checked_request import InformationalFlood

_OS_ERRORS: Final = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.ETIMEDOUT: "timeout",
}
_NO_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}
)
"""OpenSSL's reasons when the other side does not speak TLS, in its versions."""
_TLS_ALERT: Final = r"\x15\x03"
"""The beginning of a TLS alert, as aiohttp quotes it in the error for a wrong status line."""


TRANSIENT: Final = (
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    InformationalFlood,
    aiohttp.ClientResponseError,  # The answer is not HTTP, or a proxy refuses the connection.
    TimeoutError,
    OSError,
)
"""Errors after which the same request may succeed. Any other error is a bug and is raised."""


def error_code(error: BaseException) -> str:
    """Return the value of the metrics' label `code` for a request without an answer."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "dns"
        case aiohttp.ClientSSLError():
            return "tls"
        case TimeoutError():
            return "timeout"
        case aiohttp.ServerDisconnectedError():
            return "reset"
        case aiohttp.ClientOSError():
            return _OS_ERRORS.get(error.errno or 0, "error")
    return "error"


def make_no_answer_error(
    op: str, error: BaseException, *, plain: bool = False
) -> ControlPlaneError:
    """Return the error to raise for a request without an answer.

    `plain`: the request was sent without TLS, and no request of this client was answered before.
    """
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        # An untrusted certificate is not transient: retries fail until somebody replaces it.
        problem = getattr(error.certificate_error, "verify_message", "") or "not valid"
        return RefusedError(op, None, f"the TLS certificate is not trusted: {problem}")
    if isinstance(error, TimeoutError):
        return TransientError(op, None, "no answer in time", reason="timeout")
    # Quote only the texts of connection errors. The texts of aiohttp's other errors may contain
    # bytes that were received, and these may contain secrets.
    text = str(error) if isinstance(error, aiohttp.ClientConnectorError) else type(error).__name__
    hint = _find_wrong_scheme_hint(error, plain=plain)
    return TransientError(op, None, f"no answer: {text}{hint}", reason="network")


def _find_wrong_scheme_hint(error: BaseException, *, plain: bool) -> str:
    """Return a hint if the error shows that `base_url` has the wrong scheme for its port."""
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        reason = getattr(error.os_error, "reason", None)
        return "; the port does not speak TLS: base_url is https" if reason in _NO_TLS else ""
    if _TLS_ALERT in str(getattr(error, "message", "")):
        return "; the port speaks TLS: base_url must begin with https://"
    closed = isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError)
    if plain and closed:
        return "; if the port speaks TLS, base_url must begin with https://"
    return ""
