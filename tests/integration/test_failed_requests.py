"""The reactions of a pool to failed and refused polls, acks and heartbeats."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from workpool import Session, Supervisor, handler
from workpool.errors import PollerError, RefusedError
from workpool.events import (
    AckFinished,
    CredentialRefreshed,
    DrainStarted,
    HeartbeatFinished,
    ItemReclaimed,
    PollerBackedOff,
    PollerRestarted,
    PollFinished,
    SessionFinished,
    SessionStarted,
)
from workpool.testing import Hold, delay, garbled, literal, lost, reset, status
from workpool.wire.client import WorkClient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiohttp import web

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder
    from workpool.testing.fault import Fault
    from workpool.testing.fault_rules import Request
    from workpool.testing.http_faults import FaultMiddleware

REFUSALS = [400, 401, 403, 404]


@handler
async def return_at_once(_: Session) -> None:
    pass


@handler
async def return_after_interruption(session: Session) -> dict[str, str]:
    await session.interrupted()
    return {"draining": str(session.draining)}


@pytest.fixture(autouse=True)
def short_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workpool.pool.poller.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("workpool.pool.item_requests.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("workpool.pool.lease.RETRY_PARTS", (6000,))


REDIRECT_HEADERS = {"Location": "https://portal.example:8443/login?token=hunter2"}
POLL_FAULTS: dict[str, tuple[Callable[[], Fault], str, str]] = {
    "lost": (lambda: lost(applied=False), "error", "network"),
    "reset": (lambda: reset(applied=False), "error", "network"),
    "timeout": (lambda: delay(30), "timeout", "network"),
    "408": (lambda: status(408), "error", "server_error"),
    "425": (lambda: status(425), "error", "server_error"),
    "429": (lambda: status(429), "throttled", "throttled"),
    "500": (lambda: status(500), "error", "server_error"),
    "502_html": (lambda: status(502, html=True), "error", "server_error"),
    "503": (lambda: status(503), "error", "server_error"),
    "504": (lambda: status(504, html=True), "error", "server_error"),
    "101": (lambda: literal(b"", 101), "error", "server_error"),
    "302": (lambda: literal(b"", 302, headers=REDIRECT_HEADERS), "error", "server_error"),
    "304": (lambda: literal(b"", 304), "error", "server_error"),
    "460": (lambda: literal(b"", 460), "error", "server_error"),
    "699": (lambda: literal(b"", 699), "error", "server_error"),
    "not_json": (lambda: garbled(applied=False), "error", "server_error"),
    "not_an_item": (lambda: literal(b'{"id": 7}'), "error", "server_error"),
    "a_list": (lambda: literal(b"[]"), "error", "server_error"),
}


@pytest.mark.parametrize("case", POLL_FAULTS)
async def test_failed_poll_is_repeated_after_delay(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, case: str
) -> None:
    fault, result, reason = POLL_FAULTS[case]
    # aiohttp repeats a GET once when its connection was closed, so one failure needs two faults.
    failures = 2 if reason == "network" and result == "error" else 1
    faults.add(fault(), "poll", times=failures)
    timeout = 1.0 if case == "timeout" else 30.0
    async with make_pool(return_at_once, request_timeout=timeout, block_ms=20) as supervisor:
        control_plane.enqueue()
        finished = await recorder.wait_for(SessionFinished)
        assert supervisor.status().ready
    assert finished.outcome == "completed"
    first = recorder.of(PollFinished)[0]
    assert first.result == result
    assert {event.reason for event in recorder.of(PollerBackedOff)} == {reason}
    assert not recorder.of(PollerRestarted)


async def test_redirected_poll_logs_only_scheme_host_and_port_of_new_url(
    faults: Faults, make_pool: Any, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    faults.add(literal(b"", 302, headers=REDIRECT_HEADERS), "poll", times=1)
    async with make_pool(return_at_once, block_ms=20):
        await recorder.wait_for(PollerBackedOff)
    (line,) = [each for each in caplog.messages if each.startswith("poll failed")]
    assert "302 redirected to https://portal.example:8443:" in line
    assert "login" not in line
    assert "hunter2" not in line


@pytest.mark.parametrize("code", [429, 503, 500])
async def test_poll_is_repeated_after_time_in_retry_after_header(
    faults: Faults, make_pool: Any, recorder: Recorder, code: int
) -> None:
    faults.add(status(code, retry_after="0.3"), "poll", times=1)
    async with make_pool(return_at_once, block_ms=20):
        first, second = await faults.wait_for("poll"), await faults.wait_for("poll", count=2)
    assert second.at - first.at >= 0.3
    (backed_off,) = recorder.of(PollerBackedOff)
    assert (backed_off.reason, backed_off.seconds) == ("retry_after", 0.3)


@pytest.mark.parametrize(("code", "shared"), [(429, True), (503, True), (500, False), (502, False)])
async def test_answer_429_or_503_to_one_poll_delays_polls_of_all_pollers(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, code: int, *, shared: bool
) -> None:
    # Without a cooldown, the second poller would receive this item and poll again at once.
    control_plane.enqueue()
    hold = Hold()
    # The second poll is still in flight when the first one is answered.
    faults.add(hold, "poll", skip=1, times=1)
    seconds = 0.4 if shared else 60.0
    faults.add(status(code, retry_after=str(seconds)), "poll", times=1)
    async with make_pool(return_at_once, pollers=2, block_ms=20):
        first = await faults.wait_for("poll", answered=True)
        await hold.reached()
        hold.release()
        third = await faults.wait_for("poll", count=3)
    assert (third.at - first.at >= seconds) is shared


@pytest.mark.parametrize("code", REFUSALS)
async def test_refused_poll_is_fatal_if_no_poll_has_succeeded(
    faults: Faults, make_pool: Any, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    faults.add(status(code), "poll")
    async with make_pool(return_at_once) as supervisor:
        with pytest.raises(RefusedError) as caught:
            await supervisor.wait()
        assert supervisor.status().error is caught.value
        assert "failed: RefusedError" in supervisor.status().reasons
    assert caught.value.status == code
    assert len(faults.of("poll")) == 1
    assert [record.levelname for record in caplog.records if "pool failed" in record.message] == [
        "CRITICAL"
    ]


async def test_fatal_poll_error_is_raised_at_end_of_async_with_block(
    faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    faults.add(status(403), "poll")
    supervisor = make_pool(return_at_once)
    await supervisor.__aenter__()
    await recorder.wait_for(DrainStarted)
    assert recorder.of(PollerBackedOff) == []
    with pytest.raises(RefusedError):
        await supervisor.__aexit__(None, None, None)


@pytest.mark.parametrize("code", REFUSALS)
async def test_refused_poll_is_repeated_if_earlier_poll_has_succeeded(
    faults: Faults, make_pool: Any, recorder: Recorder, code: int
) -> None:
    rule = faults.add(status(code), "poll", skip=1)
    async with make_pool(return_at_once, block_ms=20) as supervisor:
        await recorder.wait_for(PollerBackedOff, count=3)
        assert supervisor.status().reasons == ("refused by the control plane",)
        rule.remove()
        await recorder.wait_for(PollFinished, lambda event: event.result == "null", count=2)
        assert supervisor.status().ready
    reread = len(recorder.of(CredentialRefreshed))
    assert reread == (rule.hits if code in {401, 403} else 0)


@pytest.mark.parametrize("code", REFUSALS)
async def test_pool_fails_and_drains_sessions_if_polls_are_refused_for_too_long(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch, code: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("workpool.pool.poller.REFUSED_SECONDS", 0.1)
    (item,) = control_plane.enqueue()
    async with make_pool(return_after_interruption, block_ms=20) as supervisor:
        await recorder.wait_for(SessionStarted)
        faults.add(status(code), "poll")
        with pytest.raises(RefusedError):
            await supervisor.wait()
    (finished,) = recorder.of(SessionFinished)
    assert finished.outcome == "completed"
    assert control_plane.operations.get_item(control_plane.environments[0], item.id).metadata == {
        "draining": "True"
    }


def request_has_token(token: str) -> Callable[[Request], bool]:
    return lambda request: request.headers["Authorization"] == f"Bearer {token}"


@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize("op", ["poll", "ack", "heartbeat", "update", "stop"])
async def test_refused_call_is_repeated_at_once_with_renewed_token_from_file(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, tmp_path: Path, code: int, op: Any
) -> None:
    file = tmp_path / "token"
    file.write_text(control_plane.token)
    hold = Hold()
    faults.add(hold, op, times=1)
    # While the first request is delayed, the token in the file is replaced. Requests with the old
    # token are refused.
    faults.add(status(code), op, where=request_has_token(control_plane.token))

    @handler
    async def return_result(_: Session) -> dict[str, str]:
        return {"a": "b"}

    async def renew_token() -> None:
        await hold.reached()
        file.write_text("renewed")
        hold.release()

    faults.add(accept_renewed_token(control_plane), where=request_has_token("renewed"))
    (item,) = control_plane.enqueue()
    async with make_pool(return_result, token_file=file), asyncio.TaskGroup() as group:
        group.create_task(renew_token())
        await faults.wait_for("stop", answered=True, count=2 if op == "stop" else 1)
    assert (
        control_plane.operations.get_item(control_plane.environments[0], item.id).state == "stopped"
    )
    assert [request.status for request in faults.of(op)][:2] == [code, 200]


def accept_renewed_token(plane: ControlPlane) -> FaultMiddleware:
    """Return a middleware that makes the control plane accept the client's renewed token."""

    async def add_valid_token_to_request(request: web.Request, handler: Any) -> web.StreamResponse:
        headers = request.headers.copy()
        headers["Authorization"] = f"Bearer {plane.token}"
        answer: web.StreamResponse = await handler(request.clone(headers=headers))
        return answer

    return add_valid_token_to_request


class CrashingClient(WorkClient):
    """A client whose poll raises an unexpected exception."""

    crashes = 0
    bug: BaseException = KeyError("a bug")

    async def poll(self, *args: Any, **named: Any) -> Any:
        if self.crashes:
            self.crashes -= 1
            raise self.bug
        return await super().poll(*args, **named)


def connect_crashing_client(
    times: int, bug: BaseException | None = None
) -> Callable[[Any], WorkClient]:
    def make_client(settings: Any) -> WorkClient:
        client = CrashingClient(settings)
        client.crashes = times
        client.bug = bug or client.bug
        return client

    return make_client


async def test_crashed_poller_is_restarted_and_counted(
    control_plane: ControlPlane, make_settings: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    plugins = [return_at_once, recorder]
    async with Supervisor(
        make_settings(), plugins=plugins, connect=connect_crashing_client(4)
    ) as supervisor:
        await recorder.wait_for(SessionFinished)
        assert supervisor.status().ready
    assert len(recorder.of(PollerRestarted)) == 4


async def test_poller_that_raises_cancelled_error_is_restarted(
    control_plane: ControlPlane, make_settings: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    connect = connect_crashing_client(2, asyncio.CancelledError("leaked"))
    async with Supervisor(make_settings(), plugins=[return_at_once, recorder], connect=connect):
        await recorder.wait_for(SessionFinished)
    assert len(recorder.of(PollerRestarted)) == 2


async def test_five_poller_crashes_in_a_row_are_fatal(
    make_settings: Any, recorder: Recorder
) -> None:
    plugins = [return_at_once, recorder]
    async with Supervisor(
        make_settings(), plugins=plugins, connect=connect_crashing_client(5)
    ) as supervisor:
        with pytest.raises(PollerError) as caught:
            await supervisor.wait()
    assert isinstance(caught.value.__cause__, KeyError)


async def test_first_of_two_fatal_errors_is_raised(make_pool: Any) -> None:
    async with make_pool(return_at_once) as supervisor:
        supervisor._drain_after_error(PollerError("the cause"))
        supervisor._drain_after_error(PollerError("what followed"))
        with pytest.raises(PollerError, match="the cause"):
            await supervisor.wait()


async def test_unexpected_exception_that_ends_pool_is_logged_with_traceback(
    control_plane: ControlPlane, make_settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class ClientWithFailingAck(WorkClient):
        async def ack(self, *_: Any, **__: Any) -> Any:
            raise KeyError("a bug")

    control_plane.enqueue()
    supervisor = await Supervisor(
        make_settings(), plugins=[return_at_once], connect=ClientWithFailingAck
    ).__aenter__()
    await asyncio.wait({supervisor._require_pool_task()})
    assert supervisor.status().reasons[0] == "failed: KeyError"
    [record] = [each for each in caplog.records if "pool failed" in each.message]
    assert record.levelname == "CRITICAL"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)
    with pytest.raises(KeyError, match="a bug"):
        await supervisor.__aexit__(None, None, None)


ACK_FAULTS: dict[str, Callable[[], Fault]] = {
    "lost": lost,
    "never_applied": lambda: lost(applied=False),
    "reset": reset,
    "timeout": lambda: delay(30, applied=True),
    "408": lambda: status(408),
    "425": lambda: status(425),
    "429": lambda: status(429),
    "500_applied": lambda: status(500, applied=True),
    "502_html": lambda: status(502, html=True),
    "not_json": garbled,
    "not_an_item": lambda: literal(orjson.dumps({"id": "work_1"}), applied=True),
}


@pytest.mark.parametrize("case", ACK_FAULTS)
async def test_failed_ack_is_repeated_and_item_runs_once(
    run_one_item: Any, faults: Faults, recorder: Recorder, case: str
) -> None:
    faults.add(ACK_FAULTS[case](), "ack", times=2)
    timeout = 1.0 if case == "timeout" else 30.0
    final = await run_one_item(return_at_once, request_timeout=timeout)
    assert final.outcome == "completed"
    assert final.request_names[:3] == ["ack", "ack", "ack"]
    assert [event.result for event in recorder.of(AckFinished)] == ["ok"]
    assert len(recorder.of(SessionStarted)) == 1
    assert not recorder.of(ItemReclaimed)


async def test_throttled_ack_is_not_repeated_after_reclaim_window(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    faults.add(status(429), "ack")
    control_plane.enqueue()
    async with make_pool(return_at_once, reclaim_older_than_ms=100, concurrency=1) as supervisor:
        acked = await recorder.wait_for(AckFinished)
        assert supervisor.status().running == 0
    assert acked.result == "error"
    # A 429 shows that the ack was not applied. If the ack might have been applied, the pool would
    # repeat it for 54 s.
    assert acked.delivery_seconds < 40
    assert not recorder.of(SessionStarted)


async def test_ack_that_may_have_been_applied_is_repeated_after_reclaim_window(
    run_one_item: Any, faults: Faults, recorder: Recorder
) -> None:
    """The repetition is safe: after an applied ack, no other worker can get the item."""
    faults.add(status(500, retry_after="0.2", applied=True), "ack", times=1)
    final = await run_one_item(return_at_once, reclaim_older_than_ms=100)
    assert final.request_names == ["ack", "ack", "heartbeat", "stop"]
    assert [event.result for event in recorder.of(AckFinished)] == ["ok"]


async def test_ack_is_repeated_after_time_in_retry_after_header(
    run_one_item: Any, faults: Faults
) -> None:
    faults.add(status(429, retry_after="0.3"), "ack", times=1)
    final = await run_one_item(return_at_once)
    first, second = faults.of("ack")
    assert second.at - first.at >= 0.3
    assert final.outcome == "completed"


@pytest.mark.parametrize(
    ("code", "result"), [(400, "error"), (401, "error"), (403, "error"), (404, "gone")]
)
async def test_item_with_refused_ack_is_run_after_redelivery(
    run_one_item: Any, faults: Faults, recorder: Recorder, code: int, result: str
) -> None:
    faults.add(status(code), "ack", times=1)
    final = await run_one_item(return_at_once, reclaim_older_than_ms=50, block_ms=20)
    assert [event.result for event in recorder.of(AckFinished)] == [result, "ok"]
    assert final.outcome == "completed"
    assert final.request_names == ["ack", "ack", "heartbeat", "stop"]
    assert not recorder.of(ItemReclaimed)


@pytest.mark.parametrize("code", [409, 412])
async def test_item_whose_ack_is_answered_409_or_412_is_lost(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, code: int
) -> None:
    faults.add(status(code), "ack")
    (item,) = control_plane.enqueue()
    async with make_pool(return_at_once):
        reclaimed = await recorder.wait_for(ItemReclaimed)
    assert (reclaimed.direction, reclaimed.stage) == ("lost", "ack")
    assert [event.result for event in recorder.of(AckFinished)] == ["conflict"]
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack"]


@pytest.mark.parametrize("case", ACK_FAULTS)
async def test_failed_heartbeat_is_repeated_within_lease(
    run_one_item: Any, faults: Faults, recorder: Recorder, case: str
) -> None:
    faults.add(ACK_FAULTS[case](), "heartbeat", times=2)
    timeout = 1.0 if case == "timeout" else 30.0
    final = await run_one_item(return_at_once, request_timeout=timeout)
    assert final.outcome == "completed"
    assert len(recorder.of(SessionStarted)) == 1
    results = [event.result for event in recorder.of(HeartbeatFinished)]
    assert results[-1] == "ok"
    assert set(results[:2]) <= {"transient", "timeout", "recovered"}


@pytest.mark.parametrize("code", [401, 403])
async def test_heartbeat_with_invalid_token_is_repeated_within_lease(
    run_one_item: Any, faults: Faults, recorder: Recorder, code: int
) -> None:
    faults.add(status(code), "heartbeat", times=2)
    final = await run_one_item(return_at_once)
    assert final.outcome == "completed"
    assert [event.result for event in recorder.of(HeartbeatFinished)] == [
        "rejected", "rejected", "ok",
    ]  # fmt: skip
    assert len(recorder.of(CredentialRefreshed)) == 2


@pytest.mark.parametrize("code", [400, 404])
async def test_refused_heartbeat_loses_lease(
    run_one_item: Any, faults: Faults, recorder: Recorder, code: int
) -> None:
    faults.add(status(code), "heartbeat")
    final = await run_one_item(return_at_once)
    assert final.outcome == "lease_lost"
    assert final.request_names == ["ack", "heartbeat"]
    assert not recorder.of(SessionStarted)
    # A 404 is reported as a lost item. A 400 means only that the request was wrong.
    reclaims = [(event.direction, event.stage) for event in recorder.of(ItemReclaimed)]
    assert reclaims == ([("lost", "start")] if code == 404 else [])
