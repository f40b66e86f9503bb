"""The errors that workpool raises, as one tree of classes.

Callers branch on class and attributes, never on text. No message, attribute or repr contains a
token or the body of an answer.
"""

import errno
from typing import Final, Literal

Reason = Literal["network", "timeout", "not_sent", "throttled", "server_error", "bad_body"]

EXHAUSTED: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN}
)
"""Error numbers of a machine that has run out of descriptors, disk, memory or processes."""

KEY_CHARACTERS: Final = 128
"""Number of characters of a metadata key in the text of an error."""


class WorkpoolError(Exception):
    """The base class of all errors of workpool."""


class SettingsError(WorkpoolError):
    """Some settings are wrong. The text of the error names each of them, but shows no value.

    Attributes:
        problems: One sentence for each wrong value; the name of the setting comes first.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class PluginError(WorkpoolError):
    """A plugin cannot be used, so the pool does not start.

    Attributes:
        plugin: The name under which the plugin was requested.
    """

    def __init__(self, plugin: str, problem: str) -> None:
        super().__init__(f"plugin {plugin!r}: {problem}")
        self.plugin = plugin


class ListenError(WorkpoolError):
    """The address of `metrics_listen` cannot be bound."""


class RegistryError(WorkpoolError):
    """The registry already has the pool's metrics, or another metric with one of their names."""


class LeaseRenewerError(WorkpoolError):
    """The lease renewer failed, so no lease can be extended, and the pool ends.

    See workpool/docs/architecture.md, "Renewals".
    """


class PollerError(WorkpoolError):
    """A poller crashed five times in a row, so the pool ends; `__cause__` is the last crash."""


class ControlPlaneError(WorkpoolError):
    """A call failed: the control plane answered with an error, or not at all.

    See workpool/docs/protocol.md, "Errors".

    Attributes:
        op: The name of the call: poll, ack, heartbeat, stop, update, get, list, stats, session, …
        status: The HTTP status; None if there was no answer.
        error_type: `error.type` of the answer; None if it has none.
        param: `error.param` of the answer; None if it has none.
    """

    def __init__(
        self,
        op: str,
        status: int | None,
        message: str,
        *,
        error_type: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(f"{op}: {message}" if status is None else f"{op}: {status} {message}")
        self.op = op
        self.status = status
        self.error_type = error_type
        self.param = param


class TransientError(ControlPlaneError):
    """The same call may succeed later: no answer, 408, 425, 429, 5xx, or an unreadable 2xx.

    An answer that only a gateway gives is transient too: a redirect, 101, a status that HTTP does
    not define.

    Attributes:
        reason: The kind of failure; `not_sent`: a check right before the request stopped it.
        retry_after: Seconds to wait, as the control plane asked; None if it did not ask.
    """

    def __init__(
        self,
        op: str,
        status: int | None,
        message: str,
        *,
        reason: Reason,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(op, status, message)
        self.reason = reason
        self.retry_after = retry_after

    @property
    def may_be_applied(self) -> bool:
        """Whether the control plane may have carried out the call."""
        return self.reason not in {"not_sent", "throttled"}


class UnreadableError(TransientError):
    """The body of a 2xx answer is malformed or too large. Answers to other calls may be readable.

    Attributes:
        work_id: The id of the answer's item; None if it could not be read.
    """

    def __init__(
        self, op: str, status: int | None, message: str, *, work_id: str | None = None
    ) -> None:
        super().__init__(op, status, message, reason="bad_body")
        self.work_id = work_id


class TooLargeError(UnreadableError):
    """The body of a 2xx answer is too large. The caller should request a smaller page."""

    def __init__(self, op: str, status: int | None, *, work_id: str | None = None) -> None:
        super().__init__(op, status, "the answer is too large", work_id=work_id)


class RefusedError(ControlPlaneError):
    """The control plane refused the call: HTTP status 400, 401, 403, 404 or another 4xx."""


class NotPermittedError(RefusedError):
    """The credential does not permit this call. After one refusal, a pool does not repeat it."""


class ConflictError(ControlPlaneError):
    """409: the item's state or holder does not allow this call."""


class PreconditionError(ControlPlaneError):
    """412: `expected_last_heartbeat` is not the last heartbeat of the item."""


class SessionGoneError(WorkpoolError):
    """A call of a session was not sent, because the pool no longer holds the item.

    Attributes:
        work_id: The item.
    """

    def __init__(self, work_id: str, message: str) -> None:
        super().__init__(f"{work_id}: {message}")
        self.work_id = work_id


class LeaseLost(SessionGoneError):
    """The lease of the item is lost. Another worker may have the item."""

    def __init__(self, work_id: str) -> None:
        super().__init__(work_id, "the lease is lost; another worker may have the item")


class SessionEnded(SessionGoneError):
    """The session has ended: its handler returned or was cancelled, or the item was stopped."""

    def __init__(self, work_id: str) -> None:
        super().__init__(work_id, "the session has ended")


class HandoverError(WorkpoolError):
    """No child process took the item over in time, so the pool keeps it.

    A child process that starts later cannot take the item over.

    Attributes:
        work_id: The item.
    """

    def __init__(self, work_id: str) -> None:
        super().__init__(f"{work_id}: no child has taken the item over in time")
        self.work_id = work_id


class AttemptsExceeded(WorkpoolError):
    """An item was run `max_attempts` times before, so it failed without another run."""


class ResultError(WorkpoolError):
    """The result of a handler cannot be written as metadata, so its session failed.

    Attributes:
        key: The key of the metadata that cannot be written.
        size: The number that is too large: the length of the key or of its value in characters, or
            the position of the pair in the result. None if there is another reason.
        limit: The largest size that the dialect allows; None if there is another reason.
    """

    def __init__(
        self, key: str, problem: str, *, size: int | None = None, limit: int | None = None
    ) -> None:
        shown = key if len(key) <= KEY_CHARACTERS else f"{key[:KEY_CHARACTERS]}…"
        super().__init__(f"result: {shown!r} {problem}")
        self.key = key
        self.size = size
        self.limit = limit


class SessionStalled(WorkpoolError):
    """A session made no progress for `stall_timeout` seconds, so its handler was cancelled."""


def innermost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Unwrap exception groups that contain a single exception.

    Returns:
        The only error inside the nested groups, or the innermost group that contains several.
    """
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def exhausted(error: BaseException | None) -> bool:
    """Return whether an error shows that the machine has run out of a resource.

    The resources are descriptors, disk, memory, processes and threads. Causes of the error and
    errors in exception groups are checked, too.
    """
    # The causes of errors may form a cycle: `seen` prevents an endless loop.
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        if _shows_resource_exhaustion(each):
            return True
        seen.add(id(each))
        left.append(each.__cause__ or each.__context__)
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
    return False


def _shows_resource_exhaustion(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):  # Python raises a RuntimeError if no thread can start.
        return error.args == ("can't start new thread",)
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MemoryError) or (isinstance(number, int) and number in EXHAUSTED)
