"""The requests at the end of a session, and the outcome if they fail.

See workpool/docs/semantics.md, "How a session ends".
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release, Session, handler
from workpool.errors import RefusedError
from workpool.events import HeartbeatFinished, SessionFinished, StopFinished
from workpool.pool.lease import Lease
from workpool.testing import Hold, delay, expire_lease, garbled, literal, lost, reset, status

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder
    from workpool.testing.fault import Fault

FIRST_CALLS = ["ack", "heartbeat"]
TRANSIENT: dict[str, Callable[[], Fault]] = {
    "lost": lost,
    "never_applied": lambda: lost(applied=False),
    "reset": reset,
    "not_json": garbled,
    "408": lambda: status(408),
    "425": lambda: status(425),
    "429": lambda: status(429, retry_after="0.01"),
    "500": lambda: status(500, applied=True),
    "502_html": lambda: status(502, html=True),
    "503": lambda: status(503),
}


@handler
async def return_result(_: Session) -> dict[str, str]:
    return {"rows": "7"}


@pytest.fixture
def run_until_drain_deadline(
    control_plane: ControlPlane,
    make_pool: Any,
    faults: Faults,
    wait_for_session_end: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Return a function that runs one session that is still completing at the drain's deadline."""
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 0.2)

    async def run_session(call: Any, op: Any, count: int) -> Any:
        (item,) = control_plane.enqueue()
        async with make_pool(call, drain_timeout=0.1):
            await faults.wait_for(op, count=count)
        return await wait_for_session_end(item.id)

    return run_session


@pytest.fixture(autouse=True)
def short_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workpool.pool.item_requests.RETRY_SECONDS", 0.01)


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
async def test_stop_call_is_repeated_until_answered(
    run_one_item: Any, faults: Faults, fault: Callable[[], Fault], recorder: Recorder
) -> None:
    faults.add(fault(), "stop", times=2)
    final = await run_one_item(return_result)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    assert final.request_names == [*FIRST_CALLS, "update", "stop", "stop", "stop"]
    assert [event.result for event in recorder.of(StopFinished)] == ["ok"]


async def test_failing_stop_call_is_repeated_until_drain_deadline(
    run_until_drain_deadline: Any, faults: Faults
) -> None:
    faults.add(status(503), "stop")
    final = await run_until_drain_deadline(return_result, "stop", 3)
    assert (final.outcome, final.item.state) == ("released", "active")


async def test_result_write_is_repeated_for_longer_than_request_timeout(
    run_one_item: Any, faults: Faults
) -> None:
    """The write of a finished session's result is retried as long as the lease is held."""
    failures: list[float] = []

    def should_fail_request(_: object) -> bool:
        failures.append(time.monotonic())
        return failures[-1] < failures[0] + 1.5

    faults.add(status(503), "update", where=should_fail_request)
    final = await run_one_item(return_result, request_timeout=1.0)
    assert (final.outcome, final.item.state, final.metadata) == (
        "completed",
        "stopped",
        {"rows": "7"},
    )


@pytest.mark.parametrize("op", ["update", "stop"])
async def test_completion_call_is_repeated_within_lease_although_server_asks_for_longer_wait(
    run_one_item: Any, faults: Faults, monkeypatch: pytest.MonkeyPatch, op: Any
) -> None:
    """One 429 must not cause a finished session to be run again."""
    monkeypatch.setattr(
        Lease, "remaining_seconds", lambda lease, now: 2.0 if lease.is_held(now) else 0.0
    )
    faults.add(status(429, retry_after=60), op, times=1)
    final = await run_one_item(return_result)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    first, second = [request.at for request in final.sent if request.op == op]
    # The pool does not repeat the call at once. Its wait is shorter than the requested 60 s, so
    # that it can repeat the call before the item's lease ends.
    assert second - first > 0.5


@pytest.mark.parametrize("code", [409, 412])
@pytest.mark.parametrize("applied", [False, True])
async def test_session_completes_if_stop_call_is_answered_with_conflict(
    run_one_item: Any, faults: Faults, recorder: Recorder, code: int, *, applied: bool
) -> None:
    faults.add(status(code, applied=applied), "stop")
    final = await run_one_item(return_result)
    assert final.outcome == "completed"
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]
    assert [event.result for event in recorder.of(StopFinished)] == ["conflict"]


@pytest.mark.parametrize(("code", "result_label"), [(400, "error"), (403, "error"), (404, "gone")])
async def test_refused_stop_call_fails_session(
    run_one_item: Any, faults: Faults, recorder: Recorder, code: int, result_label: str
) -> None:
    faults.add(status(code), "stop")
    final = await run_one_item(return_result)
    assert (final.outcome, final.item.state) == ("failed", "active")
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]
    assert [event.result for event in recorder.of(StopFinished)] == [result_label]


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_session_completes_if_heartbeat_conflict_follows_unanswered_stop_call(
    run_one_item: Any, faults: Faults, recorder: Recorder
) -> None:
    """The pool's stop is applied but never answered, and the next heartbeat is answered 409."""
    faults.add(Hold(applied=True), "stop")
    final = await run_one_item(return_result)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    assert recorder.of(HeartbeatFinished)[-1].result == "conflict"
    assert [event.result for event in recorder.of(StopFinished)] == ["ok"]
    # The pool reads the item, because a 409 could also mean that the item is queued again.
    assert final.request_names[-1] == "get"


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_unanswered_stop_call_counts_as_success_if_item_turns_out_to_be_stopped(
    run_one_item: Any, faults: Faults, recorder: Recorder
) -> None:
    """The pool reads the item after an unanswered heartbeat and a heartbeat answered with 412."""
    hold = Hold(applied=True)
    faults.add(hold, "stop")
    faults.add(lost(), "heartbeat", where=lambda _: hold.held > 0, times=1)
    faults.add(status(412), "heartbeat", where=lambda _: hold.held > 0)
    final = await run_one_item(return_result)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    assert final.request_names[-1] == "get"
    assert [event.result for event in recorder.of(StopFinished)] == ["ok"]


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_outcome_is_stopped_if_stop_call_gets_429_and_another_client_then_stops_item(
    control_plane: ControlPlane, faults: Faults, run_one_item: Any
) -> None:
    """The control plane does not apply the pool's stop (429), and another client stops the item."""

    def stop_item_as_another_client() -> bytes:
        work_id = faults.of("ack")[-1].work_id
        control_plane.operations.stop_item(control_plane.environments[0], work_id or "", force=True)
        return b""

    faults.add(
        literal(stop_item_as_another_client, 429, headers={"Retry-After": "60"}), "stop", times=1
    )
    final = await run_one_item(return_result)
    assert (final.outcome, final.item.state) == ("stopped", "stopped")
    assert final.request_names.count("stop") == 1


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
async def test_result_is_written_again_until_control_plane_answers(
    run_one_item: Any, faults: Faults, fault: Callable[[], Fault]
) -> None:
    faults.add(fault(), "update", times=2)
    final = await run_one_item(return_result)
    assert (final.outcome, final.metadata) == ("completed", {"rows": "7"})
    assert final.request_names == [*FIRST_CALLS, "update", "update", "update", "stop"]


async def test_item_whose_result_cannot_be_written_is_not_stopped(
    run_until_drain_deadline: Any, faults: Faults
) -> None:
    faults.add(status(503), "update")
    final = await run_until_drain_deadline(return_result, "update", 2)
    assert (final.outcome, final.item.state) == ("released", "active")
    assert "stop" not in final.request_names


async def test_item_whose_result_write_is_never_answered_is_not_stopped(
    run_until_drain_deadline: Any, faults: Faults
) -> None:
    faults.add(delay(30), "update")
    final = await run_until_drain_deadline(return_result, "update", 1)
    assert (final.outcome, final.item.state) == ("released", "active")
    assert final.request_names == [*FIRST_CALLS, "update"]


async def test_result_whose_first_write_is_never_answered_is_written_again(
    run_one_item: Any, faults: Faults
) -> None:
    faults.add(delay(60), "update", times=1)
    final = await run_one_item(return_result, request_timeout=1.0)
    assert (final.outcome, final.metadata) == ("completed", {"rows": "7"})
    assert final.request_names.count("update") >= 2


@pytest.mark.parametrize("code", [401, 403])
async def test_refused_result_write_fails_session_if_earlier_result_was_written(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    wait_for_session_end: Any,
    code: int,
) -> None:
    """Only a refusal of a credential's first write shows that the credential may not write.

    Here the credential has written the first item's result before the second result is refused.
    """
    faults.add(status(code), "update", skip=1, times=1)
    async with make_pool(return_result, concurrency=1):
        ended = [await wait_for_session_end(item.id) for item in control_plane.enqueue(2)]
    assert [final.outcome for final in ended] == ["completed", "failed"]


@pytest.mark.parametrize("code", [400, 404])
async def test_refused_result_fails_session_with_error_in_metadata(
    run_one_item: Any, faults: Faults, code: int
) -> None:
    faults.add(status(code), "update", times=1)
    final = await run_one_item(return_result)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.request_names == [*FIRST_CALLS, "update", "update", "stop"]
    assert final.metadata == {"workpool.error": "RefusedError"}
    assert isinstance(final.finished.error, RefusedError)


async def test_session_fails_if_control_plane_refuses_result_and_error_metadata(
    run_one_item: Any, faults: Faults
) -> None:
    faults.add(status(400), "update")
    final = await run_one_item(return_result)
    assert (final.outcome, final.item.state, final.metadata) == ("failed", "stopped", {})
    assert final.request_names == [*FIRST_CALLS, "update", "update", "stop"]


@pytest.mark.parametrize("code", [409, 412])
async def test_session_completes_if_result_write_is_answered_with_conflict(
    run_one_item: Any, faults: Faults, code: int
) -> None:
    faults.add(status(code), "update")
    final = await run_one_item(return_result)
    assert final.outcome == "completed"
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]


async def test_item_is_stopped_although_write_of_handler_error_is_refused(
    run_one_item: Any, faults: Faults
) -> None:
    async def raise_error(_: Session) -> None:
        raise ValueError

    faults.add(status(400), "update")
    final = await run_one_item(raise_error)
    assert (final.outcome, final.item.state, final.metadata) == ("failed", "stopped", {})
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_item_is_neither_written_nor_stopped_after_lease_is_lost_during_completion(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, wait_for_session_end: Any
) -> None:
    hold = Hold()
    faults.add(hold, "update")
    (item,) = control_plane.enqueue()
    async with make_pool(return_result, reclaim_older_than_ms=600_000):
        await hold.reached()
        expire_lease(control_plane, item.id)
        control_plane.operations.ack_item(control_plane.environments[0], item.id, "another")
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state, final.metadata) == ("lease_lost", "starting", {})
    assert "stop" not in final.request_names
    assert final.request_names.count("update") == 1


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_session_outcome_is_stopped_if_another_client_stops_item_during_completion(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, wait_for_session_end: Any
) -> None:
    hold = Hold()
    faults.add(hold, "update")
    (item,) = control_plane.enqueue()
    async with make_pool(return_result):
        await hold.reached()
        control_plane.operations.stop_item(control_plane.environments[0], item.id, force=True)
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.metadata) == ("stopped", {})
    assert "stop" not in final.request_names


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_lease_is_renewed_during_completion(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, wait_for_session_end: Any
) -> None:
    hold = Hold()
    faults.add(hold, "update")
    (item,) = control_plane.enqueue()
    async with make_pool(return_result):
        await hold.reached()
        heartbeats = len(faults.of("heartbeat"))
        await faults.wait_for("heartbeat", count=heartbeats + 3, answered=True)
        hold.release()
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.metadata) == ("completed", {"rows": "7"})


async def test_session_completion_continues_after_cancellation_of_task_that_runs_pool(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
) -> None:
    """The task is cancelled while the pool writes the result. The pool still stops the item."""
    hold = Hold()
    faults.add(hold, "update")
    (item,) = control_plane.enqueue()

    async def run_embedded_pool() -> None:
        async with make_pool(return_result):
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        embedder = group.create_task(run_embedded_pool())
        await hold.reached()
        embedder.cancel()
        hold.release()
        await asyncio.wait({embedder})
    assert embedder.cancelled()
    assert len(recorder.of(SessionFinished)) == 1
    final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]


async def test_release_request_that_is_never_answered_is_given_up_at_drain_deadline(
    run_until_drain_deadline: Any, faults: Faults
) -> None:
    @handler
    async def release_session(_: Session) -> None:
        raise Release("why")

    faults.add(delay(30), "heartbeat", skip=1)
    final = await run_until_drain_deadline(release_session, "heartbeat", 2)
    assert (final.outcome, final.item.state) == ("released", "active")
    assert "stop" not in final.request_names
