"""A fault has the same effect on a call over HTTP as on a call inside one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from workpool import Settings, WorkClient
from workpool.errors import WorkpoolError
from workpool.testing import (
    Faults,
    delay,
    expired,
    garbled,
    literal,
    lost,
    reset,
    status,
    trickle,
)
from workpool.testing.fault import Fault, silence
from workpool.testing.local_client import LocalClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.server import ControlPlane

CASES: dict[str, list[Fault]] = {
    "none": [],
    "status": [status(503, retry_after=7)],
    "applied status": [status(500, applied=True)],
    "html": [status(502, html=True)],
    "lost": [lost()],
    "lost before": [lost(applied=False)],
    "reset": [reset()],
    "silence": [silence()],
    "garbled": [garbled()],
    "literal": [literal(lambda: b"[]")],
    "rewritten": [Fault(rewrite=lambda item: {**item, "state": "active"})],
    "delayed": [delay(0.02), delay(0.02, applied=True)],
    "slow": [trickle(0.0001)],
    "a slow status": [status(502, html=True, applied=True), trickle(0.0001)],
    "a status sent slowly": [trickle(0.0001), status(502, html=True, applied=True)],
    "a lost status": [lost(), status(503, applied=True)],
    "a delayed status": [delay(0.02), status(409)],
    "a status before a lost answer": [status(429), lost()],
    "rewritten twice": [
        Fault(rewrite=lambda item: {**item, "metadata": {"a": item["state"]}}),
        Fault(rewrite=lambda item: {**item, "state": "active"}),
    ],
}
SHORT_SECONDS = 0.2
"""The timeout of a call without an answer."""


class FaultEffect(NamedTuple):
    """The effect of a fault on an ack: the caller's result, the item's state, the requests."""

    answer: object
    state: str
    seen: list[tuple[str, int | None, bool]]


async def measure_effect_of_ack_fault(
    plane: ControlPlane, client: WorkClient | LocalClient, faults: Faults, case: str
) -> FaultEffect:
    (item,) = plane.enqueue()
    silent = any(fault.answer == "silence" for fault in CASES[case])
    try:
        acked = await client.ack(item.id, timeout=SHORT_SECONDS if silent else None)
        answer: object = (acked.state, dict(acked.metadata))
        # The client may receive the answer before the call is recorded.
        await faults.wait_for("ack", answered=True)
    except WorkpoolError as error:
        answer = (type(error), getattr(error, "status", None), getattr(error, "reason", None))
    state = plane.operations.get_item(item.environment_id, item.id).state
    return FaultEffect(
        answer, state, [(each.op, each.status, each.lost) for each in faults.of("ack")]
    )


@pytest.mark.parametrize("case", CASES)
async def test_fault_has_same_effect_over_http_and_in_process(
    control_plane: ControlPlane, faults: Faults, make_settings: Callable[..., Settings], case: str
) -> None:
    for fault in CASES[case]:
        faults.add(fault, "ack")
    local_faults = Faults(over_http=False)
    for fault in CASES[case]:
        local_faults.add(fault, "ack")
    settings = make_settings()
    local = LocalClient(
        control_plane.operations,
        settings,
        faults=local_faults.fault_for_call,
        on_answer=local_faults.record_answer_status,
    )
    async with WorkClient(settings) as client, local:
        over_http = await measure_effect_of_ack_fault(control_plane, client, faults, case)
        assert (
            await measure_effect_of_ack_fault(control_plane, local, local_faults, case) == over_http
        )


async def test_lease_expiry_fault_causes_conflict_at_next_heartbeat_over_http_and_in_process(
    control_plane: ControlPlane, faults: Faults, make_settings: Callable[..., Settings]
) -> None:
    faults.add(expired(control_plane), "heartbeat")
    settings = make_settings()
    local = LocalClient(control_plane.operations, settings, faults=lambda _: expired(control_plane))
    async with WorkClient(settings) as client, local:
        for each in (client, local):
            (item,) = control_plane.enqueue()
            await client.ack(item.id)
            with pytest.raises(WorkpoolError, match="409"):
                await each.heartbeat(item.id)
