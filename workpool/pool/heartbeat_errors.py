"""The consequences of a failed heartbeat for the lease, such as those of a 404, 409 or 412.

See workpool/docs/architecture.md, "The arithmetic of a lease".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, NamedTuple

from workpool.errors import ConflictError, PreconditionError, TransientError

if TYPE_CHECKING:
    from workpool.errors import ControlPlaneError
    from workpool.events import HeartbeatResult, LossReason


class LeaseErrorConsequence(NamedTuple):
    """The consequence of a failed heartbeat, or of a failed read of the item, for the lease.

    Attributes:
        result: The heartbeat's result for the metrics.
        then: `repeat` the heartbeat while the lease lasts, or `read` the item, or the reason for
            which the lease is lost.
    """

    result: HeartbeatResult
    then: Literal["repeat", "read"] | LossReason


def classify_heartbeat_error(
    error: ControlPlaneError, *, owner_unknown: bool
) -> LeaseErrorConsequence:
    """Return the consequence of a heartbeat's error for the lease.

    Args:
        error: The error.
        owner_unknown: An earlier heartbeat was not answered, or a handoff is in progress, so that a
            412 leaves open which process holds the item.
    """
    if isinstance(error, TransientError):
        return LeaseErrorConsequence(
            "timeout" if error.reason == "timeout" else "transient", "repeat"
        )
    if isinstance(error, ConflictError):
        return LeaseErrorConsequence("conflict", "read")
    if isinstance(error, PreconditionError):
        return LeaseErrorConsequence("precondition", "read" if owner_unknown else "taken")
    if error.status == HTTPStatus.BAD_REQUEST:
        # The control plane considers the request invalid, so repeating the request is useless.
        return LeaseErrorConsequence("rejected", "refused")
    # Repeat after other errors: a token, a proxy or a certificate may be repaired while the lease
    # lasts.
    return LeaseErrorConsequence(
        "rejected", "gone" if error.status == HTTPStatus.NOT_FOUND else "repeat"
    )


def classify_item_read_error(error: ControlPlaneError) -> LeaseErrorConsequence:
    """Return the consequence for the lease if reading the item fails with this error.

    A GET has no reason for a 409 or 412, so a gateway must have sent it, and the read is repeated.
    """
    if isinstance(error, ConflictError | PreconditionError):
        return LeaseErrorConsequence("rejected", "repeat")
    return classify_heartbeat_error(error, owner_unknown=True)
