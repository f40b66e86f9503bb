"""The parts of the demo: its state, the output of its workers, and its views."""

from __future__ import annotations

import asyncio
import io
import json
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from workpool import Session
from workpool.cli.demo import plain_view, sample
from workpool.cli.demo.demo_runner import promise_text
from workpool.cli.demo.demo_state import DemoState
from workpool.cli.demo.demo_workers import (
    Worker,
    WorkerMetrics,
    _lines,
    read_metrics,
    worker_settings,
)
from workpool.cli.demo.live_view import picture
from workpool.cli.demo.plain_view import PlainView
from workpool.cli.tables import print_table
from workpool.events import ItemReclaimed, PollFinished, SessionFinished
from workpool.metrics import Metrics, PoolSnapshot
from workpool.server import History, Record, Summary
from workpool.wire.items import parse_item

if TYPE_CHECKING:
    from workpool.server.history import Kind
    from workpool.wire.protocol import State

ITEM = {
    "id": "work_1",
    "data": {"type": "session", "id": "sess_1"},
    "environment_id": "env_1",
    "state": "active",
    "metadata": {"text": "hi", "seconds": "0.01"},
    "created_at": "2026-03-01T12:00:00Z",
}


class Held:
    remaining = 10.0

    def check(self) -> None: ...

    async def update_metadata(self, patch: object) -> object: ...


def session() -> Session:
    return Session(parse_item(ITEM), Held(), redelivered=False)  # type: ignore[arg-type]  # a stand-in


class DemoHistory:
    def __init__(self) -> None:
        self.history = History()
        self.state = DemoState(40, self.history, {"w1": "session 01"})

    def record(self, kind: Kind, worker: str | None, state: State) -> list[str]:
        self.history.add(Record(0.0, "w1", kind, worker, state))
        return self.state.follow()


def test_demo_state_shows_session_reclaimed_by_second_worker() -> None:
    demo_history = DemoHistory()
    assert demo_history.record("created", None, "queued") == []
    assert demo_history.record("delivered", "one-1234", "queued") == []
    assert demo_history.record("acked", "one-1234", "starting") == []
    assert demo_history.state.held_by("one") == []  # a session counts from its first heartbeat
    assert demo_history.record("heartbeat", "one-1234", "active") == []
    assert demo_history.state.held_by("one") == ["session 01"]
    [free] = demo_history.record("lapsed", None, "queued")
    assert "one" in free
    assert demo_history.state.held == {}
    assert demo_history.record("acked", "two-1234", "starting") == ["session 01 reclaimed by two"]
    assert demo_history.record("stopped", "two-1234", "stopped") == ["session 01 finished by two"]
    assert (demo_history.state.stopped, demo_history.state.acked) == (1, 2)


def test_metrics_exposition_is_read_into_demo_figures() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(
        registry,
        "env_1",
        worker_id="vm-1",
        dialect="qoder",
        version="0",
        snapshot=lambda: PoolSnapshot(slots={"busy": 3, "free": 1}, slots_limit=4),
        handlers=["a.b"],
    )
    metrics.open()
    for result in ("item", "item", "item", "null"):
        metrics.observe(PollFinished(result, 0.5))
    metrics.observe(SessionFinished(session(), "a.b", "completed", 1.0))
    metrics.observe(ItemReclaimed(parse_item(ITEM), "gained", "poll"))
    found = read_metrics(generate_latest(registry).decode())
    metrics.close()
    assert (found.busy, found.slots, found.outcomes) == (3, 4, {"completed": 1})
    assert (found.polls, found.poll_latency, found.null_ratio) == (4, 0.5, 0.25)
    assert (found.gained, found.lost) == (1, 0)
    assert WorkerMetrics().poll_latency == 0.0


def test_worker_output_in_demo_is_filtered_by_logger_and_level() -> None:
    shown: list[str] = []
    worker = Worker("one", "echo", {}, lambda _, line: shown.append(line))

    def log(logger: str, level: str, message: str, **more: object) -> None:
        worker._read(json.dumps({"logger": logger, "level": level, "message": message, **more}))

    log("workpool.pool.supervisor", "info", "metrics served", url="http://h/metrics")
    assert (worker.state, worker.url) == ("running", "http://h/metrics")
    log("workpool.pool.poller", "info", "idle")
    log("workpool.pool.poller", "warning", "poll failed: 503", error="503")
    log("workpool.session", "info", "from a handler", error="odd", stack="its stack")
    log("mine", "info", "from a plugin")
    worker._read("printed")
    worker._read("[1, 2]")
    assert shown[1:] == [
        "poll failed: 503",
        "from a handler",
        "its stack",
        "from a plugin",
        "printed",
        "[1, 2]",
    ]


async def test_demo_worker_that_was_not_started_can_be_killed() -> None:
    worker = Worker("one", "echo", {}, lambda *_: None)
    worker.kill()
    worker.terminate()
    assert worker.state == "starting"


async def test_worker_output_lines_of_any_length_are_read() -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(b"a\nb")
    stream.feed_data(b"c\n" + b"x" * 70_000 + b"\nend")
    stream.feed_eof()
    lines = [line async for line in _lines(stream)]
    assert lines[:2] == ["a", "bc"]
    assert lines[-1] == "end"
    assert "".join(lines[2:-1]) == "x" * 70_000


def test_demo_worker_environment_overrides_settings_of_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORKPOOL_TOKEN_FILE", "mine")
    monkeypatch.setenv("WORKPOOL_BASE_URL", "https://elsewhere.example")
    monkeypatch.setenv("HOME", "/home/me")
    found = worker_settings("http://127.0.0.1:1/x", "secret", "env_1", "one")
    assert found["WORKPOOL_BASE_URL"] == "http://127.0.0.1:1/x"
    assert found["WORKPOOL_TOKEN"] == "secret"  # noqa: S105 - made up
    assert found["HOME"] == "/home/me"
    assert found["no_proxy"] == "127.0.0.1"
    assert "WORKPOOL_TOKEN_FILE" not in found


@pytest.fixture
def state() -> DemoState:
    one, two = (Worker(name, "echo", {}, lambda *_: None) for name in ("one", "two"))
    one.state, one.url = "running", "http://127.0.0.1:1/metrics"
    one.metrics = WorkerMetrics(3, 4, {"completed": 7}, 10, 0.05, 0.25, 2, 0)
    two.state = "killed"
    demo_history = DemoHistory()
    demo_history.record("acked", "one-1", "starting")
    demo_history.state.url, demo_history.state.workers = "http://cp", (one, two)
    return demo_history.state


def test_demo_picture_shows_queue_workers_and_metrics(state: DemoState) -> None:
    page = io.StringIO()
    Console(file=page, width=80).print(picture(state))
    for words in ("queue 39", "running 1", "3/4", "7 completed", "5 ms", "25%", "2 gained"):
        assert words in page.getvalue()
    assert "http://127.0.0.1:1/metrics" in page.getvalue()
    assert "killed" in page.getvalue()


def test_plain_demo_view_prints_summary_and_worker_lines(
    state: DemoState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with PlainView() as plain:
        plain.draw(state)
        assert capsys.readouterr().out == ""  # drawn at most once per PLAIN_SECONDS
        monkeypatch.setattr(plain_view, "PLAIN_SECONDS", 0.0)
        plain.draw(state)
        plain.show("one", "hello")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("-- queue 39 | running 1 | stopped 0 | one: 3/4 slots, 7 completed")
    assert "two" not in lines[0]
    assert lines[1:] == ["one  hello"]


def test_demo_summary_is_one_line_of_counts() -> None:
    text = "40 enqueued · 40 stopped · 3 reclaimed · 0 lost · 0 overlapping"
    assert promise_text(Summary(40, 40, 3, 0, 0)) == text


def test_table_cells_with_markup_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [("[red]x[/red]", "[/nothing]")])
    assert "[red]x[/red]" in capsys.readouterr().out


async def test_sample_handler_returns_text_of_session() -> None:
    assert await sample.sample(session()) == {"sample": "hi"}
