"""A pool with an environment key, which allows only poll, ack, heartbeat, stop and list."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from workpool import Release, Session, handler
from workpool.errors import AttemptsExceeded, NotPermittedError
from workpool.events import (
    HeartbeatFinished,
    ItemReclaimed,
    QueueStatsRead,
    ResultDropped,
    SessionFinished,
)
from workpool.pool import lease
from workpool.server import ControlPlane
from workpool.testing import literal, lost, status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from workpool.testing import Faults, Recorder
    from workpool.testing.advancing_clock import Clock

KEY = "key-of-a-worker"


@handler
async def return_result(_: Session) -> dict[str, str]:
    return {"done": "yes"}


@pytest.fixture(params=["qoder", "anthropic"])
def dialect(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
async def control_plane(faults: Faults, clock: Clock) -> AsyncIterator[ControlPlane]:
    worker_keys, middlewares = [KEY], [faults.middleware]
    async with ControlPlane(now=clock, worker_keys=worker_keys, middlewares=middlewares) as plane:
        yield plane


@pytest.fixture
def make_settings(
    control_plane: ControlPlane, make_settings: Callable[..., Any], dialect: str
) -> Callable[..., Any]:
    urls = {"qoder": control_plane.base_url, "anthropic": control_plane.anthropic_base_url}

    def make_settings_for_worker_key(**values: Any) -> Any:
        given = {"token": KEY, "dialect": dialect, "base_url": urls[dialect], **values}
        return make_settings(**given)

    return make_settings_for_worker_key


@pytest.fixture(autouse=True)
def short_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RETRY_PARTS", (6000,))


def count_calls_by_operation(faults: Faults) -> Counter[str]:
    return Counter(request.op for request in faults.seen)


async def wait_for_finished_sessions(recorder: Recorder, count: int) -> list[SessionFinished]:
    await recorder.wait_for(SessionFinished, count=count)
    return recorder.of(SessionFinished)


async def test_each_call_forbidden_for_worker_key_is_sent_and_logged_once(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        async with make_pool(return_result, stats_interval=0.02, concurrency=1):
            control_plane.enqueue(5)
            ends = await wait_for_finished_sessions(recorder, 5)
            await faults.wait_for("poll", count=len(faults.of("poll")) + 2, answered=True)
    assert {end.outcome for end in ends} == {"completed"}
    assert {
        control_plane.operations.get_item(item.environment_id, item.id).state
        for item in list_all_items(control_plane)
    } == {"stopped"}
    assert (
        count_calls_by_operation(faults)["update"] == count_calls_by_operation(faults)["stats"] == 1
    )
    assert len(recorder.of(ResultDropped)) == 5
    assert not recorder.of(QueueStatsRead)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(vars(record)["error"].split()[0] for record in warnings) == [
        "stats:",
        "update:",
    ]
    assert "yes" not in caplog.text


def list_all_items(plane: ControlPlane) -> tuple[Any, ...]:
    return tuple(plane.operations.list_items(plane.environments[0], 100).items)


async def test_lease_is_recovered_from_item_list_if_worker_key_forbids_reading_item(
    run_one_item: Any, faults: Faults, recorder: Recorder
) -> None:
    faults.add(lost(), "heartbeat", times=1)
    final = await run_one_item(return_result)
    assert final.outcome == "completed"
    results = [event.result for event in recorder.of(HeartbeatFinished)]
    assert results == ["transient", "recovered", "ok"]
    assert count_calls_by_operation(faults)["get"] == 1
    expected = [each.query.get("expected_last_heartbeat") for each in faults.of("heartbeat")]
    assert expected[:2] == ["NO_HEARTBEAT", "NO_HEARTBEAT"]
    assert None not in expected


async def test_lease_is_lost_after_unanswered_heartbeat_if_item_list_lacks_item(
    run_one_item: Any, faults: Faults, recorder: Recorder
) -> None:
    faults.add(lost(), "heartbeat", times=1)
    empty = {"data": [], "has_more": False, "next_page": None}
    faults.add(literal(orjson.dumps(empty)), "list")
    final = await run_one_item(return_result)
    assert final.outcome == "lease_lost"
    assert [each.op for each in final.sent if each.op != "ack"] == ["heartbeat", "heartbeat", "get"]
    assert not recorder.of(ItemReclaimed)


async def test_lease_is_lost_after_heartbeat_conflict_if_worker_key_forbids_reading_item(
    run_one_item: Any, faults: Faults
) -> None:
    faults.add(status(409), "heartbeat")
    final = await run_one_item(return_result)
    assert final.outcome == "lease_lost"
    assert [each.op for each in final.sent] == ["ack", "heartbeat", "get"]
    assert not faults.of("list")


async def test_refused_get_request_is_not_repeated_after_next_heartbeat_conflict(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    faults.add(status(409), "heartbeat")
    async with make_pool(return_result, concurrency=1):
        control_plane.enqueue(3)
        ends = await wait_for_finished_sessions(recorder, 3)
    assert {end.outcome for end in ends} == {"lease_lost"}
    assert count_calls_by_operation(faults)["get"] == 1


async def test_pool_counts_attempts_itself_if_worker_key_forbids_metadata_writes(
    control_plane: ControlPlane, clock: Clock, make_pool: Any, recorder: Recorder
) -> None:
    attempts: list[int] = []

    held = asyncio.Event()

    @handler
    async def record_attempt_number_and_wait(session: Session) -> None:
        attempts.append(session.attempt)
        held.set()
        await asyncio.Event().wait()

    async with make_pool(
        record_attempt_number_and_wait, max_attempts=2, reclaim_older_than_ms=0, block_ms=50
    ):
        (item,) = control_plane.enqueue()
        for _ in range(2):
            await held.wait()
            held.clear()
            clock.advance(100)
            control_plane.operations.wake_all_polls()
            await recorder.wait_for(SessionFinished, count=len(attempts))
        ends = await wait_for_finished_sessions(recorder, 3)
    assert attempts == [1, 2]
    assert [end.outcome for end in ends] == ["lease_lost", "lease_lost", "failed"]
    assert isinstance(ends[-1].error, AttemptsExceeded)
    assert (
        control_plane.operations.get_item(control_plane.environments[0], item.id).state == "stopped"
    )


async def test_released_session_is_not_counted_as_attempt_if_worker_key_forbids_metadata_writes(
    control_plane: ControlPlane, clock: Clock, make_pool: Any, recorder: Recorder
) -> None:
    attempts: list[int] = []

    @handler
    async def release_item(session: Session) -> None:
        attempts.append(session.attempt)
        if len(attempts) < 3:
            raise Release("not yet")

    async with make_pool(release_item, block_ms=50):
        control_plane.enqueue()
        for count in (1, 2):
            await wait_for_finished_sessions(recorder, count)
            clock.advance(100)
            control_plane.operations.wake_all_polls()
        ends = await wait_for_finished_sessions(recorder, 3)
    assert attempts == [1, 1, 1]
    assert ends[-1].outcome == "completed"


async def test_metadata_write_raises_without_further_requests_if_worker_key_forbids_it(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    errors: list[str] = []

    @handler
    async def write_metadata(session: Session) -> None:
        try:
            await session.update_metadata({"step": "1"})
        except NotPermittedError as error:
            errors.append(str(error))

    async with make_pool(write_metadata):
        control_plane.enqueue(3)
        ends = await wait_for_finished_sessions(recorder, 3)
    assert {end.outcome for end in ends} == {"completed"}
    assert len(errors) == 3
    assert "may not make this call" in errors[0]
    # Each of the three sessions may send one call before the first refusal arrives.
    assert count_calls_by_operation(faults)["update"] <= 3


async def test_handler_error_fails_session_although_worker_key_forbids_metadata_writes(
    run_one_item: Any, faults: Faults
) -> None:
    @handler
    async def raise_error(_: Session) -> None:
        raise ValueError("on purpose")

    final = await run_one_item(raise_error)
    assert final.outcome == "failed"
    assert final.metadata == {}
    assert count_calls_by_operation(faults)["update"] == 1


async def test_api_key_is_used_only_for_calls_that_worker_key_may_not_make(
    control_plane: ControlPlane, run_one_item: Any, faults: Faults, recorder: Recorder, dialect: str
) -> None:
    names: list[tuple[str, bool]] = []

    async def record_credential(request: Any, handler: Any) -> Any:
        headers = request.headers
        key = headers.get("X-Api-Key") or headers.get("Authorization", "").split()[-1]
        names.append((request.path.rpartition("/")[2], key == control_plane.token))
        assert ("X-Api-Key" in headers) == (dialect == "anthropic" and key == control_plane.token)
        return await handler(request)

    faults.add(
        record_credential, "poll", "ack", "heartbeat", "stop", "list", "get", "update", "stats"
    )
    faults.add(lost(), "heartbeat", times=1)
    final = await run_one_item(return_result, api_key=control_plane.token, stats_interval=60)
    assert final.outcome == "completed"
    assert final.metadata == {"done": "yes"}
    assert not recorder.of(ResultDropped)
    await recorder.wait_for(QueueStatsRead)
    assert not faults.of("list")
    with_key = {name for name, key in names if key}
    assert with_key == {"stats", final.item.id}
    assert {name for name, key in names if not key} == {"poll", "ack", "heartbeat", "stop"}


async def test_refused_poll_makes_pool_try_forbidden_calls_again(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    """A fault that refused a poll for a while may have refused the optional calls, too."""
    async with make_pool(return_result, concurrency=1, block_ms=20):
        control_plane.enqueue()
        await wait_for_finished_sessions(recorder, 1)
        faults.add(status(403), "poll", times=1)
        await faults.wait_for("poll", count=len(faults.of("poll")) + 3)
        control_plane.enqueue(2)
        await wait_for_finished_sessions(recorder, 3)
    assert count_calls_by_operation(faults)["update"] == 2
