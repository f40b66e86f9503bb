"""Conversion of temporary database errors to an HTTP 503, so that clients repeat the call.

An error that may be gone after some time is a 503. Every other error, such as a violated constraint
or a wrong statement, is a defect, which stays as it is: a 500 with a traceback in the log. See
workpool/docs/protocol.md, "Errors".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import asyncpg

from workpool.server.api_errors import APIError

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_AFTER_SECONDS: Final = 1

DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""All errors that a call of the driver raises."""

READ_ONLY: Final = "it is read-only"
_CUT: Final = "the connection was lost"
_REASONS: Final[Mapping[str, str]] = {
    "25006": READ_ONLY,
    "25P03": _CUT,  # the database ended a transaction that was idle for too long
    "25P05": _CUT,
    "3D000": "the database does not exist",
    "53300": "it has too many connections",
    "55P03": "a lock was not free in time",
    "57014": "a statement took too long",
    "57P03": "it starts or ends",
    "08": _CUT,
    "28": "it refused the login",
    "53": "it has no resources left",
    "57": "it was shut down",
    "58": "its machine has a problem",
}
"""Reason by SQLSTATE, or by the class of the SQLSTATE, which is its first two characters."""

_CONFLICTS: Final[Mapping[str, str]] = {
    "40001": "concurrent changes collided",
    "40P01": "concurrent changes waited for each other",
}
"""Reason by SQLSTATE of an error after which a repeated transaction may succeed at once."""


class UnavailableError(APIError):
    """A 503: the database cannot carry out a call now, but the same call may succeed soon.

    A change may have been committed although its confirmation was lost.

    Attributes:
        reason: The end of a sentence about the database; it has no text of the driver's.
        retry_after: Seconds after which the client should repeat the call.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(503, f"the database is not available: {reason}")
        self.reason = reason
        self.retry_after = RETRY_AFTER_SECONDS


class RetryableError(UnavailableError):
    """The database rolled back a transaction; the transaction may be repeated at once."""


def to_unavailable_error(error: BaseException) -> UnavailableError | None:
    """Return the 503 for a temporary error of the driver; None for any other error."""
    if isinstance(error, asyncpg.InvalidCachedStatementError | asyncpg.OutdatedSchemaCacheError):
        return RetryableError("its schema was changed")
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        if state in _CONFLICTS:
            return RetryableError(_CONFLICTS[state])
        reason = _REASONS.get(state) or _REASONS.get(state[:2])
    else:
        reason = _describe_driver_error(error)
    return None if reason is None else UnavailableError(reason)


def _describe_driver_error(error: BaseException) -> str | None:
    """Return the reason for a temporary error without an SQLSTATE; None for other errors."""
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, OSError):
        return "it cannot be reached"
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return READ_ONLY
    if isinstance(error, asyncpg.InternalClientError):
        # The driver raises this error if a call begins while the server closes the connection.
        return _CUT
    # `InterfaceError` reports a closed connection, or a wrong use of the driver. Only the text of
    # the error distinguishes them.
    closed = type(error) is asyncpg.InterfaceError and "clos" in str(error)
    return _CUT if closed else None
