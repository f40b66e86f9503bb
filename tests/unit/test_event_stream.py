"""Event streams of a session in virtual time, over connections that fail in many ways."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workpool import Settings
from workpool.errors import TransientError
from workpool.server import Operations
from workpool.testing import in_virtual_time, local_events
from workpool.testing.fault import Fault
from workpool.testing.local_client import FaultScript, LocalClient
from workpool.testing.virtual_time import run_on_virtual_loop
from workpool.wire import endpoints
from workpool.wire.events import event_stream
from workpool.wire.events.event_calls import EventPage, PermissiveSessionGuard
from workpool.wire.events.event_stream import EventStream
from workpool.wire.events.session_events import SessionEvents
from workpool.wire.http.call_options import DEFAULT_OPTIONS, CallOptions
from workpool.wire.page_limits import PAGES_PER_SECOND, STALE_PAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from workpool.wire.events.event_calls import EventCalls, EventStreamConnection, SessionEvent

ENVIRONMENT = "env_00000000000070008000000000000001"
START = 1_772_366_400.0


class SessionEventsTestbed:
    """A control plane on the running loop with one session."""

    def __init__(self, **faults: list[Fault | None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.operations = Operations([ENVIRONMENT], now=lambda: START + self.loop.time())
        (item,) = self.operations.enqueue(ENVIRONMENT)
        self.session_id = item.session_id
        self.script = FaultScript(**faults)
        self.settings = Settings(
            environment_id=ENVIRONMENT, base_url="http://127.0.0.1:1", token=ENVIRONMENT
        )
        self.client = LocalClient(self.operations, self.settings, faults=self.script)

    def emit_event(self, number: int) -> None:
        self.operations.emit_events(self.session_id, [{"type": "agent.thinking", "number": number}])

    @property
    def ids_of_emitted_events(self) -> list[str]:
        return [
            event.id for event in self.operations.sessions.get_conversation(self.session_id).events
        ]

    @property
    def number_of_opened_streams(self) -> int:
        return [op for op, _ in self.script.sent].count("stream")


@in_virtual_time
async def test_event_stream_with_keep_alives_stays_open_for_a_day() -> None:
    bench = SessionEventsTestbed()
    async with bench.client as client, client.events(bench.session_id).stream() as stream:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(86_400):
                await anext(stream)
        assert bench.number_of_opened_streams == 1
        bench.emit_event(1)
        assert (await anext(stream))["number"] == 1


@in_virtual_time
async def test_event_stream_without_keep_alives_is_reopened() -> None:
    bench = SessionEventsTestbed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_events, "KEEP_ALIVE_SECONDS", 1e6)
        async with bench.client as client, client.events(bench.session_id).stream() as stream:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(450):
                    await anext(stream)
    # Without keep-alives, the client reopens the stream every 45 s plus backoff.
    assert 9 <= bench.number_of_opened_streams <= 11


@in_virtual_time
async def test_event_stream_with_a_slow_reader_keeps_events_without_reopening() -> None:
    """An hour in which the reader does not read must not count as an hour without keep-alives."""
    bench = SessionEventsTestbed()
    async with bench.client as client, client.events(bench.session_id).stream() as stream:
        bench.emit_event(0)
        await anext(stream)
        for number in range(3):
            await asyncio.sleep(3600)
            bench.emit_event(number)
            assert (await anext(stream))["number"] == number
    assert bench.number_of_opened_streams == 1


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_event_stream_backoff_grows_to_ten_seconds_and_restarts_after_event() -> None:
    bench = SessionEventsTestbed(stream=[Fault(answer=503)] * 200)
    bench.emit_event(0)
    async with bench.client as client, client.events(bench.session_id).stream() as stream:
        assert (await anext(stream))["number"] == 0
        delays = [0.5, 1, 2, 4, 8] + 195 * [10]
        assert bench.loop.time() == pytest.approx(sum(delays), abs=0.5)
        assert stream._backoff.failures == 0


@in_virtual_time
async def test_event_stream_retries_after_delay_requested_by_control_plane() -> None:
    bench = SessionEventsTestbed(stream=[Fault(answer=429, retry_after=100)])
    bench.emit_event(0)
    async with bench.client as client, client.events(bench.session_id).stream() as stream:
        await anext(stream)
    assert bench.loop.time() >= 100


@in_virtual_time
async def test_event_stream_without_timely_answer_is_requested_again() -> None:
    bench = SessionEventsTestbed(
        stream=[Fault(answer="silence"), Fault(answer="reset")],
        events=[Fault(answer="silence"), Fault(answer_delay=60), Fault(answer=b"[]")],
    )
    bench.emit_event(0)
    async with bench.client as client, client.events(bench.session_id).stream() as stream:
        assert (await anext(stream))["number"] == 0
    assert bench.number_of_opened_streams == 6


class EndlessEventHistory:
    """An event history without a last page; `make` maps the number of a page to its event ids."""

    resumes = False

    def __init__(self, make: Callable[[int], list[str]]) -> None:
        self.asked: list[float] = []
        self._make = make

    async def read_event_page(
        self, limit: int, *, after_id: str | None = None, page: str | None = None
    ) -> EventPage:
        del limit, after_id, page
        self.asked.append(asyncio.get_running_loop().time())
        number = len(self.asked)
        events: list[SessionEvent] = [{"id": one, "type": "x"} for one in self._make(number)]
        return EventPage(events, f"page_{number}")

    async def append_events(
        self, body: bytes, *, options: CallOptions = DEFAULT_OPTIONS
    ) -> list[SessionEvent]:
        raise NotImplementedError

    async def open_stream(self, last_id: str | None) -> EventStreamConnection:
        del last_id
        return StreamWithoutEvents()


class StreamWithoutEvents:
    """An open stream that sends no events."""

    async def read(self) -> bytes:
        await asyncio.Event().wait()
        return b""

    def close(self) -> None:
        """Do nothing, as no connection is open."""


@in_virtual_time
async def test_event_history_is_read_at_no_more_than_twenty_pages_a_second() -> None:
    endless = EndlessEventHistory(lambda number: [f"evt_{number}"])
    clock = asyncio.get_running_loop().time
    async for _ in SessionEvents(endless, "sess_1").list():
        if clock() >= 60:
            break
    assert len(endless.asked) == pytest.approx(60 * PAGES_PER_SECOND, rel=0.01)


@pytest.mark.parametrize(
    "make",
    [lambda _: [], lambda _: ["evt_1"], lambda number: [f"evt_{number % 50}"]],
    ids=["empty", "same", "cycle"],
)
@in_virtual_time
async def test_event_list_with_endless_pages_without_new_events_raises_transient_error(
    make: Callable[[int], list[str]],
) -> None:
    endless = EndlessEventHistory(make)
    with pytest.raises(TransientError, match="without anything new"):
        [event async for event in SessionEvents(endless, "sess_1").list()]
    assert len(endless.asked) <= STALE_PAGES + 51


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_event_stream_slows_down_requests_for_pages_of_endless_history() -> None:
    endless = EndlessEventHistory(lambda _: [])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(600), SessionEvents(endless, "sess_1").stream() as stream:
            await anext(stream)
    # The stream requests 100 pages in 5 s, and then backs off for 10 s.
    assert len(endless.asked) == pytest.approx(600 * PAGES_PER_SECOND / 3, rel=0.1)


@in_virtual_time
async def test_event_stream_remembers_limited_number_of_event_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_stream, "REMEMBERED_EVENTS", 10)
    bench = SessionEventsTestbed()
    for number in range(50):
        bench.emit_event(number)
    async with bench.client as client:
        calls: Any = client.events(bench.session_id)._calls
        way = FailingEventCalls(calls, iter(()), resumes=False, replays=False)
        stream = EventStream(way, PermissiveSessionGuard(), bench.session_id, stall_seconds=45)
        received: list[SessionEvent] = []
        async with stream:
            for breaks in range(3):
                received += [await anext(stream) for _ in range(3 if breaks else 50)]
                way.conditions = iter(["cut", "cut"])
                for number in range(3):
                    bench.emit_event(number)
            received += [await anext(stream) for _ in range(3)]
            assert len(stream._seen._ids) == 10
    assert [event["id"] for event in received] == bench.ids_of_emitted_events
    assert bench.number_of_opened_streams > 1


def test_page_token_too_long_for_url_is_malformed() -> None:
    with pytest.raises(ValueError, match="next_page"):
        endpoints.EVENTS.parse({"data": [], "next_page": "x" * 5000})


class FailingEventCalls:
    """Event calls with the outcomes in `conditions`, in order; later calls all succeed."""

    def __init__(
        self, calls: EventCalls, conditions: Iterator[str], *, resumes: bool, replays: bool
    ) -> None:
        self.resumes = resumes
        self._calls = calls
        self.conditions = conditions
        self._replays = replays

    async def read_event_page(
        self, limit: int, *, after_id: str | None = None, page: str | None = None
    ) -> EventPage:
        await self.simulate_next_network_condition()
        return await self._calls.read_event_page(min(limit, 3), after_id=after_id, page=page)

    async def append_events(
        self, body: bytes, *, options: CallOptions = DEFAULT_OPTIONS
    ) -> list[SessionEvent]:
        return await self._calls.append_events(body, options=options)

    async def open_stream(self, last_id: str | None) -> EventStreamConnection:
        await self.simulate_next_network_condition()
        stream = await self._calls.open_stream(last_id if self._replays else None)
        return FailingEventStream(stream, self)

    async def simulate_next_network_condition(self) -> str:
        condition = next(self.conditions, "fine")
        if condition == "slow":
            await asyncio.sleep(2.5)
        if condition == "broken":
            raise TransientError("events", 503, "told to", reason="server_error")
        return condition


class FailingEventStream:
    """An open stream that may fall silent, send a malformed frame, or end within an event."""

    def __init__(self, stream: EventStreamConnection, way: FailingEventCalls) -> None:
        self._stream = stream
        self._way = way
        self._cut = self._silent = False

    async def read(self) -> bytes:
        if self._cut:
            return b""
        condition = await self._way.simulate_next_network_condition()
        self._silent = self._silent or condition == "silent"
        if self._silent:
            await asyncio.Event().wait()
        content = await self._stream.read()
        if condition == "cut":
            self._cut = True
            content = content[: len(content) // 2 + 1]
        if condition == "garbled":
            content += b"data: {\n\n"
        return content

    def close(self) -> None:
        self._stream.close()


CONDITIONS = st.sampled_from(["fine", "fine", "fine", "slow", "broken", "silent", "cut", "garbled"])


@settings(max_examples=150, deadline=None)
@given(
    conditions=st.lists(CONDITIONS, max_size=25),
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.3, 1.0, 7.0, 50.0]), max_size=25),
    patience=st.sampled_from([0.4, 3.0, 1000.0]),
    resumes=st.booleans(),
    replays=st.booleans(),
)
# The second page of the history fails after the first page has returned events.
@example(
    conditions=["fine", "fine", "broken"],
    pauses=[0.0] * 5,
    patience=9.0,
    resumes=False,
    replays=False,
)
# The stream falls silent while its reader is busy most of the time.
@example(
    conditions=["fine"] * 3 + ["silent"], pauses=[7.0] * 3, patience=3.0, resumes=True, replays=True
)
# The stream falls silent, and each wait of its reader is shorter than the stall time.
@example(
    conditions=["fine", "fine", "silent"],
    pauses=[7.0] * 3,
    patience=0.4,
    resumes=True,
    replays=False,
)
def test_event_stream_yields_each_event_once_and_in_order_despite_any_failures(
    conditions: Sequence[str],
    pauses: Sequence[float],
    patience: float,
    *,
    resumes: bool,
    replays: bool,
) -> None:
    async def read_events_despite_failures() -> None:
        bench = SessionEventsTestbed()
        received: list[SessionEvent] = []
        flags: list[bool] = []
        async with bench.client as client:
            calls: Any = client.events(bench.session_id)._calls
            way = FailingEventCalls(calls, iter(conditions), resumes=resumes, replays=replays)
            stream = EventStream(way, PermissiveSessionGuard(), bench.session_id, stall_seconds=45)
            async with stream, asyncio.TaskGroup() as group:
                group.create_task(emit_events(bench, pauses))
                while len(received) < len(pauses) or bench.loop.time() < sum(pauses):
                    try:
                        async with asyncio.timeout(patience):
                            received.append(await anext(stream))
                            flags.append(stream.caught_up)
                    except TimeoutError:
                        # Fail instead of waiting forever for an event that the stream has lost.
                        assert bench.loop.time() < 100_000
        assert [event["id"] for event in received] == bench.ids_of_emitted_events
        assert flags[-1:] in ([], [True])

    run_on_virtual_loop(read_events_despite_failures())


async def emit_events(bench: SessionEventsTestbed, pauses: Sequence[float]) -> None:
    for number, pause in enumerate(pauses):
        bench.emit_event(number)
        await asyncio.sleep(pause)
