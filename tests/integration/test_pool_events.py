"""Events of a whole pool: always counted, but built as objects only if their type is observed."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any, get_args

import pytest

from workpool import Session, Supervisor, handler, hookimpl
from workpool.events import Event, RequestFinished, SessionFinished, current_work_id

if TYPE_CHECKING:
    from workpool.server import ControlPlane


@handler
async def return_at_once(_: Session) -> None:
    return None


class SingleEventTypeObserver:
    """A plugin that observes one type of event."""

    def __init__(self) -> None:
        self.events: list[SessionFinished] = []

    @hookimpl
    def workpool_event(self, event: SessionFinished) -> None:
        self.events.append(event)


def count_created_events(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the event objects that are built from now on, by type."""
    built: Counter[str] = Counter()

    def count_events_of_type(event_type: Any) -> None:
        init = event_type.__init__

        def initialize_and_count_event(*args: Any, **kwargs: Any) -> None:
            built[event_type.__name__] += 1
            init(*args, **kwargs)

        monkeypatch.setattr(event_type, "__init__", initialize_and_count_event)

    for event_type in get_args(Event):
        count_events_of_type(event_type)
    return built


async def enqueue_and_run_items(
    plane: ControlPlane, make_settings: Any, items: int, *plugins: object
) -> Supervisor:
    plane.enqueue(items)
    pool = Supervisor(make_settings(), plugins=[return_at_once, *plugins])
    await pool.run(until_empty=True)
    return pool


def read_counter_value(pool: Supervisor, metric: str, **labels: str) -> float:
    labels = {"environment_id": str(pool.settings.environment_id), **labels}
    return pool.registry.get_sample_value(f"workpool_{metric}", labels) or 0.0


async def test_events_without_observer_are_counted_but_no_event_object_is_created(
    control_plane: ControlPlane, make_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = count_created_events(monkeypatch)
    pool = await enqueue_and_run_items(control_plane, make_settings, 3)
    assert not built
    assert read_counter_value(pool, "items_received_total", origin="new", type="session") == 3
    assert read_counter_value(pool, "acks_total", result="ok") == 3
    assert read_counter_value(pool, "stops_total", mode="force", result="ok") == 3
    assert read_counter_value(pool, "http_requests_total", op="ack", code="2xx") == 3
    assert read_counter_value(pool, "polls_total", result="item") == 3
    assert read_counter_value(pool, "heartbeats_total", result="ok") == 3
    label = "return_at_once.return_at_once"
    assert read_counter_value(pool, "sessions_total", handler=label, outcome="completed") == 3


async def test_event_objects_are_created_only_for_types_that_have_an_observer(
    control_plane: ControlPlane, make_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = SingleEventTypeObserver()
    built = count_created_events(monkeypatch)
    await enqueue_and_run_items(control_plane, make_settings, 3, finished)
    assert built == {"SessionFinished": 3}
    assert [event.outcome for event in finished.events] == ["completed"] * 3


class RequestObserver:
    """A plugin that records the operation and the item id of each request."""

    def __init__(self) -> None:
        self.items: list[tuple[str, str | None]] = []
        self.renewed = asyncio.Event()

    @hookimpl
    def workpool_event(self, event: RequestFinished) -> None:
        self.items.append((event.op, current_work_id.get()))
        if [op for op, _ in self.items].count("heartbeat") == 2:
            self.renewed.set()


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_current_work_id_is_set_while_observer_receives_event_about_item_request(
    control_plane: ControlPlane, make_settings: Any
) -> None:
    requests = RequestObserver()

    @handler
    async def wait_for_renewal(session: Session) -> dict[str, str]:
        assert current_work_id.get() == session.item.id
        await requests.renewed.wait()
        return {"renewed": "yes"}

    [item] = control_plane.enqueue()
    pool = Supervisor(make_settings(), plugins=[wait_for_renewal, requests])
    await pool.run(until_empty=True)
    assert current_work_id.get() is None
    items = dict.fromkeys(requests.items)
    assert {op for op, work_id in items if work_id == item.id} == {
        *("ack", "heartbeat", "update", "stop")
    }
    assert {op for op, work_id in items if work_id is None} <= {"poll", "stats"}
