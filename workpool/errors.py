"""Every error that workpool raises: one tree, branched on by class and attribute, never by text.

Owns the messages too. No message, attribute or repr may carry a token or a response body.
"""

import errno
from typing import Final, Literal

Reason = Literal["network", "timeout", "throttled", "server_error", "bad_body"]

EXHAUSTED: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN}
)
"""Error numbers of a machine that has run out of descriptors, disk, memory or processes."""


class WorkpoolError(Exception):
    """The root of the tree."""


class SettingsError(WorkpoolError):
    """Settings that cannot be used; every problem at once, by name, without its content.

    Attributes:
        problems: One sentence per bad value, each beginning with the setting's name.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class PluginError(WorkpoolError):
    """A plugin that cannot be used, found at start.

    Attributes:
        plugin: The culprit, by the name under which it was asked for.
    """

    def __init__(self, plugin: str, problem: str) -> None:
        super().__init__(f"plugin {plugin!r}: {problem}")
        self.plugin = plugin


class ListenError(WorkpoolError):
    """`metrics_listen` names an address that cannot be bound (design §6)."""


class RegistryError(WorkpoolError):
    """Metrics that cannot be put on the registry: opened twice, or their names are taken."""


class LeaseRenewerError(WorkpoolError):
    """The thread that keeps the leases died, so that no lease can be kept: fatal (design §1)."""


class PollerError(WorkpoolError):
    """A poller crashed five times in a row: fatal (design §2). The last crash is the cause."""


class ControlPlaneError(WorkpoolError):
    """A call that the control plane did not answer with success (design §2).

    Attributes:
        op: The call: poll, ack, heartbeat, stop, update, get, list, stats, session, …
        status: The HTTP status, None when no answer came.
        error_type: `error.type` of the envelope (protocol §1), None when there was none.
        param: `error.param` of the envelope, None when there was none.
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
    """Worth another try: no answer, 408, 425, 429, 5xx, or a success that cannot be read.

    So is an answer that no control plane gives, but a gateway may: a redirect, 101, a status that
    HTTP does not define. Unless `reason` is "throttled", the call may have been applied.

    Attributes:
        reason: Why, in one word.
        retry_after: Seconds that the control plane asked us to wait, None when it did not.
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


class UnreadableError(TransientError):
    """A success that cannot be read, although others may be: it is malformed or too large.

    Attributes:
        work_id: The item that it is about, as far as that could be read; else None.
    """

    def __init__(
        self, op: str, status: int | None, message: str, *, work_id: str | None = None
    ) -> None:
        super().__init__(op, status, message, reason="bad_body")
        self.work_id = work_id


class TooLargeError(UnreadableError):
    """A success whose body is larger than we accept: less should be asked for at once."""

    def __init__(self, op: str, status: int | None, *, work_id: str | None = None) -> None:
        super().__init__(op, status, "the answer is larger than we accept", work_id=work_id)


class RefusedError(ControlPlaneError):
    """Refused for good: 400, 401, 403, 404 and the other client errors that HTTP defines."""


class ConflictError(ControlPlaneError):
    """409: the item is not in a state, or not with the worker, that the call needs."""


class PreconditionError(ControlPlaneError):
    """412: `expected_last_heartbeat` is not the lease owner's (protocol §3.3)."""


class SessionGoneError(WorkpoolError):
    """A session call was not sent because the item is no longer ours to touch.

    Attributes:
        work_id: The item.
    """

    def __init__(self, work_id: str, message: str) -> None:
        super().__init__(f"{work_id}: {message}")
        self.work_id = work_id


class LeaseLost(SessionGoneError):
    """The item's lease is not held any more: another worker may have the item by now."""

    def __init__(self, work_id: str) -> None:
        super().__init__(work_id, "the lease is lost; another worker may have the item")


class SessionEnded(SessionGoneError):
    """The session is over: its handler has returned, was cancelled, or was stopped from outside."""

    def __init__(self, work_id: str) -> None:
        super().__init__(work_id, "the session has ended")


class HandoverError(WorkpoolError):
    """No child has taken the item over in time: it is ours again, and the child will be refused.

    Attributes:
        work_id: The item.
    """

    def __init__(self, work_id: str) -> None:
        super().__init__(f"{work_id}: no child has taken the item over in time")
        self.work_id = work_id


class AttemptsExceeded(WorkpoolError):
    """An item has had `max_attempts` attempts, so it failed without being run."""


def innermost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a group of one holds: nested task groups nest groups, callers want the error."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def exhausted(error: BaseException | None) -> bool:
    """Whether the machine has run out of descriptors, disk, memory, processes or threads.

    True if the error says so, or one that caused it, or one that its exception group holds.
    """
    left, seen = [error], set[int]()  # a handler may have made a circle of causes
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        if _exhaustion(each):
            return True
        seen.add(id(each))
        left.append(each.__cause__ or each.__context__)
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
    return False


def _exhaustion(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):  # threading has no class of its own for it
        return error.args == ("can't start new thread",)
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MemoryError) or (isinstance(number, int) and number in EXHAUSTED)
