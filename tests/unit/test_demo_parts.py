"""The parts of the demo: its sessions, its state, the output of its workers, and its view."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import pytest
from rich.console import Console

from workpool import Session, handler, hookimpl
from workpool.cli.demo import demo_view, sample
from workpool.cli.demo.demo_sessions import EXAMPLE, DemoSession, make_sessions_for_handler
from workpool.cli.demo.demo_state import DemoState
from workpool.cli.demo.demo_view import DemoView, make_state_table
from workpool.cli.demo.demo_workers import DemoWorker, _read_lines, worker_settings
from workpool.cli.tables import print_table
from workpool.errors import PluginError
from workpool.server import ControlPlane, Poll
from workpool.testing import Clock
from workpool.wire.items import parse_item

if TYPE_CHECKING:
    from workpool.server import Item

ITEM = {
    "id": "work_1",
    "data": {"type": "session", "id": "sess_1"},
    "environment_id": "env_1",
    "state": "active",
    "metadata": {"text": "hi", "seconds": "0.01"},
    "created_at": "2026-03-01T12:00:00Z",
}


def make_sample_session() -> Session:
    return Session(parse_item(ITEM), cast("Any", None), redelivered=False)


class DemoTestbed:
    """The state of a demo with one session, and methods that call the control plane as a worker."""

    def __init__(self, count: int = 40) -> None:
        self.clock = Clock()
        self.plane = ControlPlane(now=self.clock)
        self.item: Item
        (self.item,) = self.plane.enqueue()
        self.state = DemoState(count, self.plane, {self.item.id: "session 01"}, self.clock)
        self.state.apply_new_history_records()
        self._at = (self.item.environment_id, self.item.id)

    def claim_item(self, worker: str) -> list[str]:
        operations, environment = self.plane.operations, self.item.environment_id
        assert operations.poll(environment, Poll(f"{worker}-1234")) is not None
        operations.ack_item(*self._at, f"{worker}-1234")
        return self.state.apply_new_history_records()

    def send_heartbeat(self, worker: str) -> None:
        self.plane.operations.heartbeat(*self._at, "NO_HEARTBEAT", 10, f"{worker}-1234")
        assert self.state.apply_new_history_records() == []

    def expire_lease(self) -> list[str]:
        self.clock.advance(11)
        self.plane.operations.queue_stats(self.item.environment_id)
        return self.state.apply_new_history_records()

    def stop_item(self, worker: str, **metadata: str) -> list[str]:
        self.plane.operations.update_metadata(*self._at, metadata)
        self.plane.operations.stop_item(*self._at, f"{worker}-1234", force=True)
        return self.state.apply_new_history_records()


def test_demo_state_shows_session_reclaimed_by_second_worker() -> None:
    scene = DemoTestbed()
    assert scene.claim_item("one") == []
    # The demo shows a lease from the first heartbeat on, not from the ack on.
    assert scene.state.list_held_item_names("one") == []
    scene.send_heartbeat("one")
    assert scene.state.list_held_item_names("one") == ["session 01"]
    assert scene.expire_lease() == ["session 01 is free again: the lease of one lapsed"]
    assert scene.state.held == {}
    assert scene.claim_item("two") == ["session 01 reclaimed by two"]
    assert scene.stop_item("two") == ["session 01 finished by two"]
    assert (scene.state.ended_session_count, scene.state.acked, scene.state.reclaimed["two"]) == (
        1,
        2,
        1,
    )


def test_demo_state_counts_down_seconds_until_lease_expires() -> None:
    scene = DemoTestbed()
    assert scene.state.seconds_until_lease_lapse("one") is None
    scene.claim_item("one")
    scene.send_heartbeat("one")
    scene.clock.advance(4)
    assert scene.state.seconds_until_lease_lapse("one") == pytest.approx(6, abs=1)
    scene.expire_lease()
    assert scene.state.seconds_until_lease_lapse("one") is None


def test_demo_state_counts_failed_session_and_reports_its_error() -> None:
    scene = DemoTestbed()
    scene.claim_item("one")
    scene.send_heartbeat("one")
    error = {"workpool.error": "ValueError"}
    assert scene.stop_item("one", **error) == ["session 01 failed: ValueError"]
    assert (scene.state.completed["one"], scene.state.failed["one"]) == (0, 1)
    assert scene.state.format_results("one") == "0 completed, 1 failed"


def test_queued_held_and_ended_sessions_of_demo_always_add_up_to_total() -> None:
    scene = DemoTestbed()
    steps = (lambda: None, lambda: scene.claim_item("one"), lambda: scene.stop_item("one"))
    for step in steps:
        step()
        assert (
            scene.state.queued_session_count
            + len(scene.state.held)
            + scene.state.ended_session_count
            == 40
        )


@handler(metadata={"job": "daily-report"})
async def handle_daily_report(_: Session) -> None:
    pass


@handler(type="import")
async def handle_import(_: Session) -> None:
    pass


@hookimpl
def workpool_session_handler() -> None:
    pass


@pytest.fixture
def module_with_two_handlers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("demo_reports")
    module.__dict__.update(handle_daily_report=handle_daily_report, handle_import=handle_import)
    monkeypatch.setitem(sys.modules, "demo_reports", module)
    return module


@pytest.mark.usefixtures("module_with_two_handlers")
def test_demo_without_given_metadata_enqueues_sessions_that_match_handler_rules() -> None:
    daily, rows = DemoSession("session", {"job": "daily-report"}), DemoSession("import", {})
    assert make_sessions_for_handler("demo_reports:handle_daily_report", {}, 2) == [daily, daily]
    assert make_sessions_for_handler("demo_reports", {}, 3) == [daily, rows, daily]


@pytest.mark.usefixtures("module_with_two_handlers")
def test_demo_with_metadata_that_no_handler_rule_matches_raises_plugin_error() -> None:
    given = {"job": "daily-report", "day": "monday"}
    assert make_sessions_for_handler("demo_reports:handle_daily_report", given, 1) == [
        DemoSession("session", given)
    ]
    with pytest.raises(PluginError, match=r"takes type=session job=daily-report, not job=weekly"):
        make_sessions_for_handler("demo_reports:handle_daily_report", {"job": "weekly"}, 1)


def test_demo_does_not_check_metadata_if_plugin_has_handler_hook(
    module_with_two_handlers: ModuleType,
) -> None:
    module_with_two_handlers.__dict__["workpool_session_handler"] = workpool_session_handler
    assert make_sessions_for_handler("demo_reports", {"a": "b"}, 1) == [
        DemoSession("session", {"a": "b"})
    ]


def test_demo_example_enqueues_short_sessions_before_long_sessions() -> None:
    seconds = [each.metadata["seconds"] for each in make_sessions_for_handler(EXAMPLE, {}, 5)]
    assert seconds == ["0.2", "0.2", "0.2", "0.2", "1.5"]


def test_worker_output_in_demo_is_filtered_by_logger_and_level() -> None:
    shown: list[str] = []
    worker = DemoWorker("one", "echo", {}, lambda _, line: shown.append(line))

    def write_log_line(logger: str, level: str, message: str, **more: object) -> None:
        worker._show_output_line(
            json.dumps({"logger": logger, "level": level, "message": message, **more})
        )

    write_log_line("workpool.pool.supervisor", "info", "metrics served", url="http://h/metrics")
    assert (worker.state, worker.url) == ("running", "http://h/metrics")
    write_log_line("workpool.pool.poller", "info", "idle")
    write_log_line("workpool.pool.poller", "warning", "poll failed: 503", error="503")
    write_log_line("workpool.session", "info", "from a handler", error="odd", stack="its stack")
    write_log_line("mine", "info", "from a plugin")
    worker._show_output_line("printed")
    worker._show_output_line("[1, 2]")
    assert shown[1:] == [
        "poll failed: 503",
        "from a handler",
        "its stack",
        "from a plugin",
        "printed",
        "[1, 2]",
    ]


async def test_demo_worker_that_was_not_started_can_be_killed() -> None:
    worker = DemoWorker("one", "echo", {}, lambda *_: None)
    worker.kill()
    worker.terminate()
    assert worker.state == "starting"


async def test_demo_reads_worker_output_lines_of_any_length() -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(b"a\nb")
    stream.feed_data(b"c\n" + b"x" * 70_000 + b"\nend")
    stream.feed_eof()
    lines = [line async for line in _read_lines(stream)]
    assert lines[:2] == ["a", "bc"]
    assert lines[-1] == "end"
    assert "".join(lines[2:-1]) == "x" * 70_000


def test_environment_variables_for_demo_worker_replace_settings_of_caller(
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
def demo_state() -> DemoState:
    one, two, three = (
        DemoWorker(name, "echo", {}, lambda *_: None) for name in ("one", "two", "3")
    )
    one.state, one.url = "running", "http://127.0.0.1:1/metrics"
    two.state = "killed"
    scene = DemoTestbed()
    scene.claim_item("two")
    scene.send_heartbeat("two")
    scene.state.completed["one"], scene.state.failed["one"] = 7, 2
    scene.state.workers = (one, two, three)
    return scene.state


def test_demo_picture_shows_queue_workers_and_results(demo_state: DemoState) -> None:
    page = io.StringIO()
    Console(file=page, width=110).print(make_state_table(demo_state))
    for words in ("queue 30", "running 1", "stopped 9 of 40", "1/4", "7 completed, 2 failed"):
        assert words in page.getvalue()
    assert "http://127.0.0.1:1/metrics" in page.getvalue()
    assert "killed, leases lapse in 10 s" in page.getvalue()
    assert "starting" in page.getvalue()
    assert "0/0" not in page.getvalue()


def test_demo_view_without_terminal_prints_lines(
    demo_state: DemoState, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = io.StringIO()
    with DemoView(Console(file=page, width=40)) as plain:
        plain.draw_state(demo_state)
        # No line is due yet, because lines are printed at least LINE_SECONDS apart.
        assert page.getvalue() == ""
        monkeypatch.setattr(demo_view, "LINE_SECONDS", 0.0)
        plain.draw_state(demo_state)
        plain.print_worker_line("one", "hello")
    assert page.getvalue().splitlines() == [
        "-- queue 30   running 1   stopped 9 of 40 | one running, 0/4 slots, 7 completed, 2 failed"
        " | two killed, leases lapse in 10 s, 1/4 slots, 0 completed"
        " | 3 starting, - slots, 0 completed",
        "one  hello",
    ]


def test_demo_view_without_terminal_prints_final_state_at_once(demo_state: DemoState) -> None:
    page = io.StringIO()
    demo_state.count = demo_state.ended_session_count
    with DemoView(Console(file=page, width=40)) as plain:
        plain.draw_state(demo_state)
    assert "stopped 9 of 9" in page.getvalue()


def test_table_cells_with_markup_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [("[red]x[/red]", "[/nothing]")])
    assert "[red]x[/red]" in capsys.readouterr().out


async def test_sample_handler_returns_text_from_metadata_of_item() -> None:
    assert await sample.sample(make_sample_session()) == {"sample": "hi"}
