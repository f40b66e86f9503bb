"""The error answers of the control plane, and its exceptions for failures to start or to save.

Owns the protocol's error envelope. No message may contain a token or a request body.
See workpool/docs/protocol.md, "Errors".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from workpool.wire import protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

ERROR_TYPES: Final[Mapping[int, str]] = {
    400: protocol.INVALID_REQUEST_ERROR,
    401: protocol.AUTHENTICATION_ERROR,
    403: protocol.PERMISSION_ERROR,
    404: protocol.NOT_FOUND_ERROR,
    409: protocol.INVALID_REQUEST_ERROR,  # a session's 409 has another type: see `conflict_error`
    412: protocol.PRECONDITION_FAILED_ERROR,
    429: protocol.RATE_LIMIT_ERROR,
    500: protocol.API_ERROR,
    503: protocol.API_ERROR,
}


class APIError(Exception):
    """An HTTP answer with a status of 400 or above, as an exception.

    Attributes:
        status: The HTTP status.
        message: One sentence for people.
        param: The wrong field, query parameter or header; None if there is none.
        details: The current state of the lease, for a 412.
        kind: The envelope's error type if the status does not define it.
        retry_after: Seconds after which the client should repeat the call; None: no header.
    """

    retry_after: int | None = None

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.details = details
        self.kind = kind or ERROR_TYPES.get(status, protocol.INVALID_REQUEST_ERROR)

    def to_envelope(self) -> dict[str, Any]:
        """Return the protocol's error envelope, which is the JSON body of the answer."""
        error: dict[str, Any] = {"type": self.kind, "message": self.message}
        if self.param is not None:
            error["param"] = self.param
        if self.details is not None:
            error["details"] = self.details
        return {"type": "error", "error": error}


def conflict_error(message: str) -> APIError:
    """Return the 409 of a session endpoint; its error type differs from that of item endpoints."""
    return APIError(409, message, kind=protocol.CONFLICT_ERROR)


class ServeError(Exception):
    """The control plane cannot start: its address, store, environments or tokens are unusable."""


class StoreError(ServeError):
    """The store cannot be opened, or cannot save anything anymore."""
