"""A handler with `retry=` is called again after an error, in the same session run."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release, Retry, Session, handler, hookimpl
from workpool.events import HandlerRetried, SessionFinished, SessionStarted
from workpool.logs import TextFormatter
from workpool.testing import Kit, in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RETRY_CONNECTION_ERRORS = Retry(on=ConnectionError, times=3, backoff=20, backoff_max=60)


class FailingDependency:
    """A service that a handler depends on, and that fails at the first calls."""

    def __init__(self, failures: int = 10**6, error: Exception | None = None) -> None:
        self.calls: list[int] = []
        self.failures = failures
        self.error = error or ConnectionError("no route")

    async def fail_first_calls(self, session: Session) -> dict[str, str]:
        self.calls.append(session.retry)
        await asyncio.sleep(1)
        if len(self.calls) <= self.failures:
            raise self.error
        return {"call": str(session.retry)}


def retrying_handler(
    dependency: FailingDependency, retry: Retry = RETRY_CONNECTION_ERRORS, **arguments: Any
) -> Any:
    @handler(retry=retry, **arguments)
    async def call_failing_dependency(session: Session) -> dict[str, str]:
        return await dependency.fail_first_calls(session)

    return call_failing_dependency


async def wait_for_first_failure(workpool: Kit, dependency: FailingDependency) -> None:
    """Wait until the first call has failed, so that the handler waits for its retry.

    The test must use `longest_retry_delays`: a short random delay could end before this wait.
    """
    await workpool.wait_for(SessionStarted)
    await asyncio.sleep(1.1)
    assert dependency.calls == [0]


@in_virtual_time
async def test_handler_is_called_again_in_same_run_until_it_returns(workpool: Kit) -> None:
    dependency = FailingDependency(failures=2)
    result = await workpool.run_session(retrying_handler(dependency))
    assert (result.outcome, dict(result.metadata)) == ("completed", {"call": "2"})
    assert dependency.calls == [0, 1, 2]
    assert len(workpool.recorder.of(SessionStarted)) == 1
    assert [record.kind for record in workpool.server.history].count("acked") == 1


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_delays_between_retries_double_up_to_their_limit(workpool: Kit) -> None:
    result = await workpool.run_session(retrying_handler(FailingDependency()))
    assert result.outcome == "failed"
    assert result.seconds == pytest.approx(4 * 1 + 20 + 40 + 60, abs=0.5)


@in_virtual_time
async def test_last_error_fails_session_after_last_retry(workpool: Kit) -> None:
    dependency = FailingDependency()
    result = await workpool.run_session(retrying_handler(dependency), report_errors="message")
    assert (result.outcome, result.error) == ("failed", dependency.error)
    assert result.metadata == {"workpool.error": "ConnectionError: no route"}
    assert dependency.calls == [0, 1, 2, 3]


@in_virtual_time
@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (ConnectionResetError(), 4),
        (ExceptionGroup("g", [ConnectionError(), ExceptionGroup("h", [ConnectionError()])]), 4),
        (ExceptionGroup("g", [ConnectionError(), ValueError()]), 1),
        (ValueError(), 1),
    ],
    ids=["subclass", "group", "mixed_group", "another"],
)
async def test_only_errors_of_listed_types_are_retried(
    workpool: Kit, error: Exception, calls: int
) -> None:
    dependency = FailingDependency(error=error)
    result = await workpool.run_session(retrying_handler(dependency))
    assert (result.outcome, len(dependency.calls)) == ("failed", calls)


@in_virtual_time
async def test_handler_is_not_called_again_after_release_or_invalid_result(workpool: Kit) -> None:
    retry = Retry(on=Exception)
    dependency = FailingDependency(error=Release("later", 60))
    assert (await workpool.run_session(retrying_handler(dependency, retry))).outcome == "released"
    assert dependency.calls == [0]

    @handler(retry=retry)
    async def return_python_set(session: Session) -> Any:
        return {session.retry}

    assert (await workpool.run_session(return_python_set)).outcome == "failed"
    assert not workpool.recorder.of(HandlerRetried)


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_lost_lease_ends_retry_delay_without_another_handler_call(workpool: Kit) -> None:
    dependency = FailingDependency()
    [item] = workpool.enqueue()
    async with workpool.pool(
        # The delay is longer than the time until a heartbeat finds that the lease is lost.
        retrying_handler(dependency, Retry(on=ConnectionError, backoff=3600, backoff_max=3600)),
        concurrency=1,
        lease_ttl=60,
    ):
        await wait_for_first_failure(workpool, dependency)
        workpool.lose(item)
        finished = await workpool.wait_for(SessionFinished)
        assert (finished.outcome, dependency.calls) == ("lease_lost", [0])
        assert finished.seconds < 60


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_stop_request_ends_wait_for_retry_at_once(workpool: Kit) -> None:
    dependency = FailingDependency()
    [item] = workpool.enqueue()
    async with workpool.pool(retrying_handler(dependency)):
        await wait_for_first_failure(workpool, dependency)
        workpool.stop(item)
        finished = await workpool.wait_for(SessionFinished)
    assert (finished.outcome, dependency.calls) == ("stopped", [0])
    assert finished.seconds < 2


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_drain_during_retry_delay_releases_session_and_keeps_retry_count(
    workpool: Kit,
) -> None:
    dependency = FailingDependency()
    [item] = workpool.enqueue()
    async with workpool.pool(retrying_handler(dependency)) as pool:
        await wait_for_first_failure(workpool, dependency)
        await pool.drain(timeout=600)
        finished = await workpool.wait_for(SessionFinished)
    assert (finished.outcome, dependency.calls) == ("released", [0])
    assert finished.seconds < 2
    assert finished.error is not None
    assert finished.error.__cause__ is dependency.error
    assert workpool.item(item).metadata == {
        "workpool.released": "the pool is draining",
        "workpool.retries": "1",
    }
    async with workpool.pool(retrying_handler(dependency)):
        again = await workpool.wait_for(SessionFinished)
    assert (again.outcome, again.session.attempt) == ("failed", 1)
    assert dependency.calls == [0, 1, 2, 3]
    assert workpool.item(item).metadata == {"workpool.error": "ConnectionError"}


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_drain_during_retry_keeps_retry_number_for_next_run(workpool: Kit) -> None:
    @handler(retry=RETRY_CONNECTION_ERRORS)
    async def hang_when_retried(session: Session) -> dict[str, str]:
        if not session.redelivered:
            if session.retry == 0:
                raise ConnectionError
            await asyncio.sleep(3600)
        return {"retry": str(session.retry), "attempt": str(session.attempt)}

    [item] = workpool.enqueue()
    async with workpool.pool(hang_when_retried) as pool:
        await workpool.wait_for(HandlerRetried)
        await pool.drain(timeout=5)
    assert workpool.item(item).metadata["workpool.retries"] == "1"
    async with workpool.pool(hang_when_retried):
        await workpool.wait_for(SessionFinished, lambda event: event.outcome == "completed")
    assert workpool.item(item).metadata == {"retry": "1", "attempt": "1"}


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_handler_timeout_limits_all_retries_together(workpool: Kit) -> None:
    dependency = FailingDependency()
    result = await workpool.run_session(retrying_handler(dependency, timeout=30))
    assert (result.outcome, dependency.calls) == ("timed_out", [0, 1])
    assert result.seconds == pytest.approx(30, abs=0.5)


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_retry_due_before_lease_is_verified_after_machine_pause_is_made_in_next_run(
    workpool: Kit,
) -> None:
    dependency = FailingDependency(failures=1)
    loop: Any = asyncio.get_running_loop()
    workpool.enqueue()
    async with workpool.pool(retrying_handler(dependency), concurrency=1):
        await wait_for_first_failure(workpool, dependency)
        await asyncio.sleep(19.85)
        # After this pause, the retry is due, but no heartbeat has confirmed the lease yet.
        loop.pause(5)
        released = await workpool.wait_for(SessionFinished)
        completed = await workpool.wait_for(SessionFinished)
    assert (released.outcome, completed.outcome) == ("released", "completed")
    assert dependency.calls == [0, 1]


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_stall_timeout_applies_to_each_call_and_not_to_retry_delays(
    workpool: Kit,
) -> None:
    result = await workpool.run_session(
        retrying_handler(FailingDependency(failures=2), stall_timeout=2)
    )
    assert result.outcome == "completed"
    assert result.seconds == pytest.approx(3 * 1 + 20 + 40, abs=0.5)


@in_virtual_time
async def test_handler_that_fails_after_its_handoff_is_not_called_again(workpool: Kit) -> None:
    calls: list[int] = []
    loop, operations = asyncio.get_running_loop(), workpool.server.operations

    @handler(retry=RETRY_CONNECTION_ERRORS)
    async def hand_off_item_and_raise(session: Session) -> None:
        calls.append(session.retry)
        async with session.handover() as lease:
            first_heartbeat = (lease.environment_id, lease.work_id, lease.last_heartbeat, lease.ttl)
            loop.call_soon(operations.heartbeat, *first_heartbeat, "child")
        raise ConnectionError

    result = await workpool.run_session(hand_off_item_and_raise)
    assert (result.outcome, calls) == ("detached", [0])
    assert result.seconds < 5


@in_virtual_time
async def test_session_keeps_slot_and_lease_between_retries(workpool: Kit) -> None:
    dependency = FailingDependency(failures=2)
    workpool.enqueue(2)
    async with workpool.pool(retrying_handler(dependency), concurrency=1, lease_ttl=10) as pool:
        await workpool.wait_for(HandlerRetried)
        assert pool.status().running == 1
        await workpool.wait_for(SessionFinished)
        await workpool.wait_for(SessionFinished)
    assert dependency.calls == [0, 1, 2, 0]
    assert {event.outcome for event in workpool.recorder.of(SessionFinished)} == {"completed"}


@in_virtual_time
async def test_plugin_context_is_entered_once_around_all_retries(workpool: Kit) -> None:
    seen: list[str] = []

    class ContextRecordingPlugin:
        @hookimpl
        def workpool_wrap_session(self) -> Any:
            return self.context_that_records_exit()

        @asynccontextmanager
        async def context_that_records_exit(self) -> AsyncIterator[None]:
            try:
                yield
            except ConnectionError:
                seen.append("error")
                raise
            finally:
                seen.append("left")

    dependency = FailingDependency()
    result = await workpool.run_session(retrying_handler(dependency), ContextRecordingPlugin())
    assert (result.outcome, seen) == ("failed", ["error", "left"])
    assert len(dependency.calls) == 4


@in_virtual_time
async def test_each_retry_is_counted_and_logged_in_one_line(
    workpool: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    dependency = FailingDependency(failures=2, error=ConnectionError("no route\nforged line"))
    workpool.enqueue()
    pool = workpool.pool(retrying_handler(dependency))
    with caplog.at_level(logging.INFO, "workpool"):
        async with pool:
            await workpool.wait_for(SessionFinished)
    retried = workpool.recorder.of(HandlerRetried)
    assert [(event.retry, event.error) for event in retried] == [
        (1, dependency.error),
        (2, dependency.error),
    ]
    name = retried[0].handler
    labels = {"environment_id": workpool.server.environments[0], "handler": name}
    assert pool.registry.get_sample_value("workpool_handler_retries_total", labels) == 2
    message = "handler failed and is called again: ConnectionError: no route"
    records = [vars(each) for each in caplog.records if each.getMessage().startswith(message)]
    assert [(each["retry"], each["handler"]) for each in records] == [(1, name), (2, name)]
    assert all(each["wait_seconds"] <= 60 and each["exc_info"] is None for each in records)
    assert all(each["wait_seconds"] == round(each["wait_seconds"], 3) for each in records)
    lines = [TextFormatter().format(each) for each in caplog.records]
    assert all("\n" not in line for line in lines if message in line)


@in_virtual_time
async def test_retry_counter_is_zero_before_first_retry(workpool: Kit) -> None:
    async with workpool.pool(retrying_handler(FailingDependency())) as pool:
        [sample] = [
            sample
            for metric in pool.registry.collect()
            for sample in metric.samples
            if sample.name == "workpool_handler_retries_total"
        ]
    assert sample.value == 0
