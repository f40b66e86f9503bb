"""The outcome and the last requests of a session, for each reason why it ends.

See workpool/docs/architecture.md, "The end of a session".
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release, Session, handler
from workpool.events import SessionStarted, StopFinished
from workpool.testing import Hold, expire_lease, status

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder

FIRST_CALLS = ["ack", "heartbeat"]
SHORT_POLLS = {"block_ms": 20}


async def wait_forever(_: Session) -> None:
    await asyncio.Event().wait()


def endless_handler() -> Any:
    """Return a handler that never ends by itself."""

    @handler
    async def wait_without_end(session: Session) -> None:
        await wait_forever(session)

    return wait_without_end


def handler_ended_by_cancellation(end: Callable[[], Any]) -> Any:
    """Return a handler that waits until it is cancelled, and then returns the result of `end()`."""

    @handler
    async def end_when_cancelled(session: Session) -> Any:
        try:
            await wait_forever(session)
        except asyncio.CancelledError:
            return end()

    return end_when_cancelled


def make_function_that_raises(error: BaseException) -> Callable[[], Any]:
    def raise_error() -> Any:
        raise error

    return raise_error


async def test_session_whose_handler_returns_mapping_completes_with_metadata(
    run_one_item: Any, recorder: Recorder
) -> None:
    async def return_mapping(_: Session) -> dict[str, str]:
        return {"rows": "7", "empty": ""}

    final = await run_one_item(return_mapping)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]
    assert final.metadata == {"rows": "7", "empty": ""}
    assert final.sent[-1].body == {"force": True}
    assert final.history == ["created", "delivered", "acked", "heartbeat", "metadata", "stopped"]
    (stop,) = recorder.of(StopFinished)
    assert (stop.mode, stop.result) == ("force", "ok")


@pytest.mark.parametrize("nothing", [None, {}])
async def test_session_without_result_sends_only_ack_heartbeat_and_stop(
    run_one_item: Any, nothing: Any
) -> None:
    async def return_nothing(_: Session) -> Any:
        return nothing

    final = await run_one_item(return_nothing)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    assert final.request_names == [*FIRST_CALLS, "stop"]
    assert final.metadata == {}


async def test_exception_of_handler_fails_session_with_error_type_as_metadata(
    run_one_item: Any,
) -> None:
    error = ValueError("the secret is 42")

    async def raise_error(_: Session) -> None:
        raise error

    final = await run_one_item(raise_error)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]
    assert final.sent[-1].body == {"force": True}
    assert final.metadata == {"workpool.error": "ValueError"}
    assert final.finished.error is error


@pytest.mark.parametrize(
    ("message", "note"),
    [("why", "ValueError: why"), ("", "ValueError"), ("x" * 600, "ValueError: " + "x" * 500),
     ("a\ud800b", "ValueError: a?b")],
)  # fmt: skip
async def test_error_message_is_written_to_metadata_if_settings_allow_it(
    run_one_item: Any, message: str, note: str
) -> None:
    async def raise_with_message(_: Session) -> None:
        raise ValueError(message)

    final = await run_one_item(raise_with_message, report_errors="message")
    assert final.metadata == {"workpool.error": note}
    assert len(final.metadata["workpool.error"]) <= 512


@pytest.mark.parametrize(
    ("returned", "error"),
    [(object(), "ResultError"), (b"", "ResultError"), ({1: "a"}, "ResultError"),
     ({"a": "\ud800"}, "ResultError")],
    ids=["object", "bytes", "number_as_key", "surrogate"],
)  # fmt: skip
async def test_invalid_result_of_handler_fails_session(
    run_one_item: Any, returned: Any, error: str
) -> None:
    async def return_value(_: Session) -> Any:
        return returned

    final = await run_one_item(return_value)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]
    assert final.metadata == {"workpool.error": error}


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), asyncio.CancelledError("leaked"), GeneratorExit(), BaseException()],
    ids=lambda error: type(error).__name__,
)
async def test_base_exception_of_handler_fails_session(
    run_one_item: Any, error: BaseException
) -> None:
    async def raise_error(_: Session) -> None:
        raise error

    final = await run_one_item(raise_error)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.metadata == {"workpool.error": type(error).__name__}


@pytest.mark.parametrize(
    ("own", "setting"), [(None, 0.05), (0.05, None), (0.05, 1000.0)], ids=["setting", "own", "both"]
)
async def test_session_that_exceeds_session_timeout_has_outcome_timed_out(
    control_plane: ControlPlane,
    make_pool: Any,
    wait_for_session_end: Any,
    own: float | None,
    setting: float | None,
) -> None:
    @handler(timeout=own)
    async def exceed_handler_timeout(session: Session) -> None:
        await wait_forever(session)

    (item,) = control_plane.enqueue()
    async with make_pool(exceed_handler_timeout, session_timeout=setting):
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("timed_out", "stopped")
    assert final.request_names == [*FIRST_CALLS, "update", "stop"]
    assert final.metadata == {"workpool.error": "TimeoutError"}


@pytest.mark.parametrize(("delay", "ttl"), [(10, 10), (45, 45), (600, 600)])
async def test_session_whose_handler_raises_release_is_released_with_delay(
    run_one_item: Any, delay: float, ttl: int
) -> None:
    async def release_with_delay(_: Session) -> None:
        raise Release("come back later", delay=delay)

    final = await run_one_item(release_with_delay)
    assert (final.outcome, final.item.state) == ("released", "active")
    assert final.request_names == [*FIRST_CALLS, "update", "heartbeat"]
    assert final.metadata == {"workpool.released": "Release"}
    assert final.sent[-1].query["desired_ttl_seconds"] == str(ttl)
    assert final.item.ttl_seconds == ttl


async def test_release_reason_is_written_to_metadata_if_settings_allow_it(
    run_one_item: Any,
) -> None:
    async def release_with_reason(_: Session) -> None:
        raise Release("come back later")

    final = await run_one_item(release_with_reason, report_errors="message")
    assert final.metadata == {"workpool.released": "come back later"}


@pytest.mark.parametrize("delay", [0, 9.9, 601, 5000, float("nan")])
async def test_release_with_delay_outside_allowed_limits_fails_session(
    run_one_item: Any, delay: float
) -> None:
    async def release_with_delay(_: Session) -> None:
        raise Release("come back later", delay=delay)

    final = await run_one_item(release_with_delay)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.metadata == {"workpool.error": "ValueError"}


@pytest.mark.parametrize(
    ("group", "reason", "ttl"),
    [
        (ExceptionGroup("", [Release("only")]), "only", 10),
        (ExceptionGroup("", [Release("short", 20), Release("long", 90)]), "long", 90),
        (
            ExceptionGroup("", [ExceptionGroup("", [Release("deep", 50)]), Release("shallow", 40)]),
            "deep",
            50,
        ),
    ],
    ids=["one", "two", "nested"],
)
async def test_exception_group_that_contains_only_releases_causes_release_with_longest_delay(
    run_one_item: Any, group: ExceptionGroup[Release], reason: str, ttl: int
) -> None:
    async def raise_exception_group(_: Session) -> None:
        raise group

    final = await run_one_item(raise_exception_group, report_errors="message")
    assert (final.outcome, final.item.state) == ("released", "active")
    assert final.metadata == {"workpool.released": reason}
    assert final.sent[-1].query["desired_ttl_seconds"] == str(ttl)
    assert isinstance(final.finished.error, Release)


async def test_release_raised_in_task_group_of_handler_releases_session(run_one_item: Any) -> None:
    async def raise_release_exception() -> None:
        raise Release("come back later", delay=45)

    async def raise_release_exception_in_task(session: Session) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(raise_release_exception())
            group.create_task(wait_forever(session))

    final = await run_one_item(raise_release_exception_in_task)
    assert (final.outcome, final.item.state) == ("released", "active")
    assert final.metadata == {"workpool.released": "Release"}


@pytest.mark.parametrize(
    "group",
    [
        ExceptionGroup("", [Release("why"), ValueError()]),
        ExceptionGroup("", [Release("why"), ExceptionGroup("", [ValueError()])]),
        BaseExceptionGroup("", [Release("why"), SystemExit(3)]),
    ],
    ids=["beside", "nested", "exit"],
)
async def test_session_fails_if_exception_group_contains_release_and_another_error(
    run_one_item: Any, group: BaseExceptionGroup[BaseException]
) -> None:
    async def raise_exception_group(_: Session) -> None:
        raise group

    final = await run_one_item(raise_exception_group)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.metadata == {"workpool.error": type(group).__name__}


async def test_release_exception_in_deeply_nested_exception_group_releases_session(
    run_one_item: Any,
) -> None:
    error: Exception = Release("deep")
    for _ in range(5000):
        error = ExceptionGroup("", [error])

    async def raise_nested_exception_group(_: Session) -> None:
        raise error

    final = await run_one_item(raise_nested_exception_group)
    assert (final.outcome, final.item.state) == ("released", "active")


async def test_session_is_released_although_reason_cannot_be_written(
    run_one_item: Any, faults: Faults
) -> None:
    async def release_session(_: Session) -> None:
        raise Release("why")

    faults.add(status(400), "update")
    final = await run_one_item(release_session)
    assert (final.outcome, final.item.state, final.metadata) == ("released", "active", {})
    assert final.request_names == [*FIRST_CALLS, "update", "heartbeat"]


async def test_session_that_still_runs_at_drain_deadline_is_released(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, wait_for_session_end: Any
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler()) as supervisor:
        await recorder.wait_for(SessionStarted)
        await supervisor.drain(timeout=0)
    final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("released", "active")
    assert final.metadata == {"workpool.released": "the pool is draining"}
    assert final.request_names[-1] == "heartbeat"
    assert final.sent[-1].query["desired_ttl_seconds"] == "10"


async def test_session_outcome_is_stopped_and_result_is_written_after_stop_request(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    heartbeat_now: Any,
) -> None:
    async def return_after_interruption(session: Session) -> dict[str, str]:
        await session.interrupted()
        return {"stopping": str(session.stopping), "draining": str(session.draining)}

    (item,) = control_plane.enqueue()
    async with make_pool(handler(return_after_interruption), **SHORT_POLLS):
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        heartbeat_now(item.id)
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("stopped", "stopped")
    assert final.metadata == {"stopping": "True", "draining": "False"}
    assert final.request_names == [*FIRST_CALLS, "heartbeat", "update", "stop"]
    assert final.sent[-1].body == {"force": True}
    (stop,) = recorder.of(StopFinished)
    assert (stop.mode, stop.result) == ("confirm", "ok")


async def test_session_that_ignores_stop_request_is_stopped_after_grace_period(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    heartbeat_now: Any,
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler(), stop_grace=0.05, **SHORT_POLLS):
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        heartbeat_now(item.id)
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state, final.metadata) == ("stopped", "stopped", {})
    assert final.request_names == [*FIRST_CALLS, "heartbeat", "stop"]


async def test_stop_request_before_first_heartbeat_stops_item_without_calling_handler(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    faults: Faults,
) -> None:
    hold = Hold()
    faults.add(hold, "heartbeat")
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler()):
        await hold.reached()
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        hold.release()
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("stopped", "stopped")
    assert final.request_names == [*FIRST_CALLS, "stop"]
    assert not recorder.of(SessionStarted)


async def test_pool_sends_no_write_for_item_after_another_client_stopped_it(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    heartbeat_now: Any,
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler(), **SHORT_POLLS):
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id, force=True)
        heartbeat_now(item.id)
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state, final.metadata) == ("stopped", "stopped", {})
    assert final.request_names == [*FIRST_CALLS, "heartbeat", "get"]
    assert not recorder.of(StopFinished)


async def test_session_whose_item_is_queued_again_loses_lease(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, wait_for_session_end: Any
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler(), reclaim_older_than_ms=600_000):
        await recorder.wait_for(SessionStarted)
        # The lease expires, and the next poll of this pool receives the item again.
        expire_lease(control_plane, item.id)
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state, final.metadata) == ("lease_lost", "queued", {})
    assert final.request_names == [*FIRST_CALLS, "heartbeat", "get"]


HANDLER_ENDS = {
    "returns": lambda: None,
    "returns_a_result": lambda: {"a": "b"},
    "raises": make_function_that_raises(ValueError()),
    "releases": make_function_that_raises(Release("why")),
}


@pytest.mark.parametrize("end", HANDLER_ENDS.values(), ids=HANDLER_ENDS)
async def test_lost_lease_gives_outcome_lease_lost_whether_handler_returns_or_raises(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    heartbeat_now: Any,
    end: Any,
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(handler_ended_by_cancellation(end), **SHORT_POLLS):
        await recorder.wait_for(SessionStarted)
        expire_lease(control_plane, item.id)
        control_plane.operations.ack_item(control_plane.environments[0], item.id, "another")
        heartbeat_now(item.id)
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state, final.metadata) == ("lease_lost", "starting", {})
    # All earlier heartbeats were answered, so a 412 proves that the lease is lost, and the pool
    # need not read the item to find its holder.
    assert final.request_names == [*FIRST_CALLS, "heartbeat"]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda: {"a": "b"}, ("timed_out", "stop", {"workpool.error": "TimeoutError"})),
        (
            make_function_that_raises(ValueError()),
            ("timed_out", "stop", {"workpool.error": "ValueError"}),
        ),
        (
            make_function_that_raises(Release("why")),
            ("released", "heartbeat", {"workpool.released": "Release"}),
        ),
    ],
    ids=["returned", "raised", "released"],
)
async def test_outcome_of_timed_out_session_depends_on_how_handler_ends(
    control_plane: ControlPlane, make_pool: Any, wait_for_session_end: Any, end: Any, expected: Any
) -> None:
    outcome, last, metadata = expected
    (item,) = control_plane.enqueue()
    async with make_pool(handler_ended_by_cancellation(end), session_timeout=0.05):
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.metadata) == (outcome, metadata)
    assert final.request_names == [*FIRST_CALLS, "update", last]


@pytest.mark.parametrize(
    ("end", "metadata"),
    [
        (lambda: {"a": "b"}, {"workpool.released": "the pool is draining"}),
        (make_function_that_raises(ValueError()), {"workpool.released": "the pool is draining"}),
        (make_function_that_raises(Release("why", delay=60)), {"workpool.released": "Release"}),
    ],
    ids=["returned", "raised", "released"],
)
async def test_drain_releases_session_whether_handler_returns_or_raises(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, wait_for_session_end: Any,
    end: Any, metadata: dict[str, str],
) -> None:  # fmt: skip
    (item,) = control_plane.enqueue()
    async with make_pool(handler_ended_by_cancellation(end)) as supervisor:
        await recorder.wait_for(SessionStarted)
        await supervisor.drain(timeout=0)
    final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state, final.metadata) == ("released", "active", metadata)
    assert "stop" not in final.request_names


@pytest.mark.parametrize(
    "ending",
    [
        (lambda: {"a": "b"}, {"a": "b"}),
        (make_function_that_raises(ValueError()), {}),
        (make_function_that_raises(Release("why")), {}),
    ],
    ids=["returned", "raised", "released"],
)
async def test_stop_request_stops_session_whether_handler_returns_or_raises(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    heartbeat_now: Any,
    ending: Any,
) -> None:
    end, metadata = ending
    (item,) = control_plane.enqueue()
    async with make_pool(handler_ended_by_cancellation(end), stop_grace=0, **SHORT_POLLS):
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        heartbeat_now(item.id)
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state, final.metadata) == ("stopped", "stopped", metadata)
    assert final.request_names[-1] == "stop"


async def test_session_with_stop_request_is_stopped_and_not_released_by_drain(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    heartbeat_now: Any,
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler(), **SHORT_POLLS) as supervisor:
        started = await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        heartbeat_now(item.id)
        await started.session.interrupted()
        await supervisor.drain(timeout=0)
    final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("stopped", "stopped")


@pytest.mark.parametrize("end", HANDLER_ENDS.values(), ids=HANDLER_ENDS)
async def test_stop_by_another_client_gives_outcome_stopped_whether_handler_returns_or_raises(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    heartbeat_now: Any,
    end: Any,
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(handler_ended_by_cancellation(end), **SHORT_POLLS):
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id, force=True)
        heartbeat_now(item.id)
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.metadata) == ("stopped", {})
    assert final.request_names == [*FIRST_CALLS, "heartbeat", "get"]
