"""What the control plane refuses, and what keeps it from serving at all.

Owns the protocol's error envelope (protocol §1). No message here may carry a token or a request
body.
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
    409: protocol.INVALID_REQUEST_ERROR,  # on work endpoints; others answer conflict_error
    412: protocol.PRECONDITION_FAILED_ERROR,
    429: protocol.RATE_LIMIT_ERROR,
    500: protocol.API_ERROR,
}


class Refusal(Exception):
    """One answer with a status of 400 or above.

    Attributes:
        status: The HTTP status.
        message: One sentence for a human.
        param: The field, query parameter or header to blame, None when there is none.
        details: Protocol §3.3: what a 412 may add.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.details = details

    def envelope(self) -> dict[str, Any]:
        """The JSON body of protocol §1."""
        error: dict[str, Any] = {
            "type": ERROR_TYPES.get(self.status, protocol.INVALID_REQUEST_ERROR),
            "message": self.message,
        }
        if self.param is not None:
            error["param"] = self.param
        if self.details is not None:
            error["details"] = self.details
        return {"type": "error", "error": error}


class ServeError(Exception):
    """The control plane cannot start as asked: address, store, environments or tokens."""


class StoreError(ServeError):
    """The store cannot be opened, or can no longer make anything durable."""
