"""Virtual time: an event loop that jumps to the next timer, and a client without a network."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from workpool import Settings, Supervisor, handler
from workpool.errors import ConflictError, RefusedError, TransientError
from workpool.events import SessionFinished
from workpool.server import Operations
from workpool.testing import Recorder
from workpool.testing.fault import Fault
from workpool.testing.local_client import FaultScript, LocalClient
from workpool.testing.virtual_time import in_virtual_time, run_on_virtual_loop
from workpool.wire.http.call_options import CallOptions

if TYPE_CHECKING:
    from tests.unit.conftest import LeaseTestbed
    from workpool import Session

ENVIRONMENT = "env_00000000000070008000000000000001"


def test_sleep_of_a_year_in_virtual_time_takes_no_real_time() -> None:
    async def sleep_for_a_virtual_year() -> float:
        await asyncio.sleep(365 * 86_400)
        return asyncio.get_running_loop().time()

    before = time.monotonic()
    assert run_on_virtual_loop(sleep_for_a_virtual_year()) == 365 * 86_400
    assert time.monotonic() - before < 10


def test_wait_without_timer_in_virtual_time_raises_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="no timer"):
        run_on_virtual_loop(asyncio.Event().wait())


@in_virtual_time
async def test_timers_do_not_advance_while_simulated_machine_is_suspended(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    bench.loop.suspend(100)
    await asyncio.sleep(5)
    assert (bench.loop.time(), bench.loop.machine_time()) == (5, 105)


@in_virtual_time
async def test_local_client_answers_all_calls_for_item_from_poll_to_stop(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    codes: list[tuple[str, str]] = []
    bench.client.on_request = lambda op, code, _: codes.append((op, code))
    async with bench.client, bench.rival:
        work_id = (await bench.claim_item()).id
        heartbeat = await bench.client.heartbeat(work_id, "NO_HEARTBEAT", 30)
        assert (heartbeat.state, heartbeat.ttl_seconds) == ("active", 30)
        assert (await bench.client.update_metadata(work_id, {"a": "b"})).metadata == {"a": "b"}
        assert (await bench.client.get(work_id)).last_heartbeat == heartbeat.last_heartbeat
        assert (await bench.client.stats()).depth == 0
        stopped = await bench.client.stop(work_id, force=True)
        assert stopped is not None
        assert stopped.state == "stopped"
        with pytest.raises(ConflictError):
            await bench.rival.ack(work_id)
        with pytest.raises(RefusedError) as caught:
            await bench.client.get("work_unknown")
        assert (caught.value.status, caught.value.error_type) == (404, "not_found_error")
        assert [op for op, _ in codes] == [
            "poll",
            "ack",
            "heartbeat",
            "update",
            "get",
            "stats",
            "stop",
            "get",
        ]
    assert codes[-1] == ("get", "404")


@in_virtual_time
async def test_poll_of_local_client_waits_for_items_and_obeys_injected_faults(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(
        poll=[None, None, Fault(answer="silence"), Fault(answer_delay=2), Fault(answer=503)]
    )
    async with bench.client:
        assert await bench.client.poll(999) is None
        assert bench.clock() == pytest.approx(0.999)
        bench.loop.call_later(0.5, partial(bench.operations.enqueue, ENVIRONMENT, count=2))
        assert await bench.client.poll(999)
        assert bench.clock() == pytest.approx(1.499)
        with pytest.raises(TransientError, match="time"):
            await bench.client.poll()
        # The answer with the item was lost, so the item is delivered again after 10 s.
        again = await bench.client.poll()
        assert again is not None
        assert bench.clock() == pytest.approx(13.499)
        with pytest.raises(TransientError, match="503"):
            await bench.client.poll()


@in_virtual_time
async def test_request_that_was_sent_still_arrives_after_timeout_of_caller(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(stop=[Fault(request_delay=30)])
    async with bench.client:
        item = await bench.claim_item()
        with pytest.raises(TransientError) as caught:
            await bench.client.stop(item.id, force=True, timeout=1)
        assert caught.value.reason == "timeout"
        assert (await bench.client.get(item.id)).state == "starting"
        await asyncio.sleep(30)
        assert (await bench.client.get(item.id)).state == "stopped"


@in_virtual_time
async def test_call_of_local_client_that_is_not_open_raises_runtime_error(
    make_testbed: type[LeaseTestbed],
) -> None:
    with pytest.raises(RuntimeError, match="not open"):
        await make_testbed().client.get("work_1")


async def test_pool_with_local_client_completes_session_in_real_time() -> None:
    """The loop is real, because virtual time cannot wait for the thread of the lease renewer."""

    @handler
    async def handle_session(session: Session) -> dict[str, str]:
        return {"seen": session.id}

    operations = Operations([ENVIRONMENT])
    recorder, script = Recorder(), FaultScript(ack=[Fault(answer=503, applied=False)])
    settings = Settings(environment_id=ENVIRONMENT, token=ENVIRONMENT, stats_interval=0)
    connect = partial(LocalClient, operations, faults=script)
    (item,) = operations.enqueue(ENVIRONMENT)
    async with Supervisor(settings, plugins=[handle_session, recorder], connect=connect):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert operations.get_item(ENVIRONMENT, item.id).state == "stopped"


@in_virtual_time
async def test_local_client_sends_no_request_that_request_check_refuses() -> None:
    def refuse_request() -> None:
        raise LookupError

    operations = Operations([ENVIRONMENT])
    (item,) = operations.enqueue(ENVIRONMENT)
    settings = Settings(environment_id=ENVIRONMENT)
    async with LocalClient(operations, settings) as client:
        options = CallOptions(refuse_request)
        for call in (
            client.ack(item.id, options=options),
            client.heartbeat(item.id, options=options),
            client.stop(item.id, options=options),
            client.update_metadata(item.id, {}, options=options),
            client.get(item.id, options=options),
        ):
            with pytest.raises(LookupError):
                await call
    assert operations.get_item(ENVIRONMENT, item.id) == item


@in_virtual_time
async def test_local_client_stop_call_that_skips_item_in_answer_accepts_any_json_object() -> None:
    script = FaultScript(stop=[Fault(answer=b"{}"), Fault(answer=b"{}"), Fault(answer=b"no JSON")])
    settings = Settings(environment_id=ENVIRONMENT)
    async with LocalClient(Operations([ENVIRONMENT]), settings, faults=script) as client:
        assert await client.stop("work_1", read_item=False) is None
        with pytest.raises(TransientError):
            await client.stop("work_1")
        with pytest.raises(TransientError):
            await client.stop("work_1", read_item=False)
