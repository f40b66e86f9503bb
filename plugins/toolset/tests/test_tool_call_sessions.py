"""Tests of whole sessions in a pool with a real control plane: answers, crashes and drains."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from workpool import DaemonThreads, Session, WorkClient
from workpool.errors import TransientError
from workpool.events import SessionFinished, StopRequested
from workpool.testing import expire_lease, lost, status
from workpool_toolset import ToolCall, Toolset, tool_call_answerer
from workpool_toolset.call_journal import CallJournal
from workpool_toolset.tool_result import ToolResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from workpool.testing import Kit

    Make = Callable[..., Toolset]

Event = "Mapping[str, Any]"


WAIT_SECONDS = 60.0
"""The time limit of a wait, which a loaded machine does not exceed."""

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(autouse=True)
def _increase_wait_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow more time for the start of processes, which is slow on a loaded machine."""
    monkeypatch.setattr("workpool.testing.kit.WAIT_SECONDS", WAIT_SECONDS)


@pytest.fixture
def make_toolset(tmp_path: Path) -> Make:
    """Return a function that makes a `Toolset` without isolation, with its state in `tmp_path`."""

    def make_toolset_with_test_defaults(**settings: Any) -> Toolset:
        defaults: dict[str, Any] = {
            "isolation": "none",
            "state": str(tmp_path / "state"),
            "max_idle": 0.05,
        }
        return Toolset(**defaults | settings)

    return make_toolset_with_test_defaults


WAIT_FOR_GO = "until [ -e go ]; do sleep 0.02; done"
"""A script that waits until the file `go` exists."""


def make_bash_call(command: str, **more: Any) -> dict[str, Any]:
    return {"name": "Bash", "input": {"command": command}} | more


def list_answers_in_call_order(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """Return the answers in the order of the calls, and check that no call has two answers."""
    calls = [event["id"] for event in events if event["type"].endswith("tool_use")]
    answers: dict[str, tuple[str, bool]] = {}
    for event in events:
        if event["type"].endswith("tool_result"):
            name = event.get("tool_use_id") or event["custom_tool_use_id"]
            assert name not in answers
            text = "\n".join(block["text"] for block in event["content"])
            answers[name] = text, event.get("is_error", False)
    return [answers[name] for name in calls if name in answers]


def session_directory(tmp_path: Path, session: str) -> Path:
    return tmp_path / "state" / session


async def test_session_that_calls_every_tool_gets_expected_results(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    async def report_weather(call: ToolCall) -> object:
        return {"place": call.input["place"], "celsius": 21}

    def raise_error(call: ToolCall) -> None:
        raise RuntimeError(f"no {call.name}")

    result = await workpool.run_session(
        make_toolset(tools={"weather": report_weather, "fail": raise_error}),
        script=[
            {"name": "Write", "input": {"file_path": "a.txt", "content": "one\n"}},
            {"name": "Edit", "input": {"file_path": "a.txt", "old_string": "o", "new_string": "0"}},
            {"name": "read", "input": {"file_path": "a.txt"}},
            {"name": "GLOB", "input": {"pattern": "*"}},
            {"name": "Grep", "input": {"pattern": "ne"}},
            make_bash_call("cat a.txt; exit_now() { return 2; }; exit_now"),
            {"name": "Read", "input": {"file_path": "../journal/x"}},
            {"name": "Read", "input": {}},
            {"name": "weather", "input": {"place": "Oslo"}, "custom": True},
            {"name": "weather", "input": {}, "custom": True},
            {"name": "fail", "input": {}, "custom": True},
        ],
    )
    assert result.outcome == "completed"
    assert list_answers_in_call_order(result.events) == [
        ("wrote 4 bytes to a.txt", False),
        ("replaced 1 occurrence in a.txt", False),
        ("0ne\n", False),
        ("a.txt\n", False),
        ("a.txt:1:0ne\n", False),
        ("0ne\n\nexit status 2", True),
        ("../journal/x: outside the session's working directory", True),
        ("file_path is missing", True),
        ('{"place": "Oslo", "celsius": 21}', False),
        ("weather: KeyError: 'place'", True),
        ("fail: RuntimeError: no fail", True),
    ]
    assert result.events[-1]["stop_reason"]["type"] == "end_turn"
    workspace = session_directory(tmp_path, result.item.session_id) / "workspace"
    assert (workspace / "a.txt").read_text() == "0ne\n"


async def test_session_of_worker_that_may_not_write_metadata_is_completed(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    workpool.faults.add(status(403), "get", "update", "stats")
    toolset = make_toolset()
    result = await workpool.run_session(toolset, script=[make_bash_call("echo one")])
    assert result.outcome == "completed"
    assert list_answers_in_call_order(result.events) == [("one\n", False)]
    assert (session_directory(tmp_path, result.item.session_id) / "journal" / "name").exists()
    assert len(workpool.faults.of("update")) == 1


@contextlib.asynccontextmanager
async def automatic_confirmations(
    workpool: Kit, session: str, *verdicts: str
) -> AsyncIterator[None]:
    """Answer each confirmation request with the next of `verdicts` during the `with` block."""

    async def answer_confirmation_requests() -> None:
        left = list(verdicts)
        async with WorkClient(workpool.settings()) as client:
            events = client.events(session)
            async with events.stream() as stream:
                async for event in stream:
                    for name in event.get("stop_reason", {}).get("event_ids", ()):
                        verdict = {"tool_use_id": name, "result": left.pop(0)}
                        await events.send({"type": "user.tool_confirmation", **verdict})
                    if not left:
                        return

    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
        group.create_task(answer_confirmation_requests())
        yield


async def test_confirmed_calls_run_and_denied_calls_return_errors(
    workpool: Kit, make_toolset: Make
) -> None:
    script = [
        make_bash_call("echo allowed >> log", permission="ask"),
        make_bash_call("echo refused >> log", permission="ask"),
        make_bash_call("echo denied >> log", permission="deny"),
        make_bash_call("cat log"),
    ]
    [item] = workpool.enqueue(script=script)
    async with (
        workpool.pool(make_toolset()),
        automatic_confirmations(workpool, item.session_id, "allow", "deny"),
    ):
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    events = workpool.server.events(item.session_id)
    answers = list_answers_in_call_order(events)
    assert answers[0] == ("(no output)", False)
    assert [error for _, error in answers] == [False, True, True, False]
    assert answers[3] == ("allowed\n", False)
    ours = [event for event in events if event["type"] == "user.tool_result"]
    # The worker has answered only the two allowed calls. The control plane answers denied calls.
    assert len(ours) == 2


async def test_session_that_waits_for_confirmation_is_not_stalled(
    workpool: Kit, make_toolset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_waiting, waiting = Session.waiting, asyncio.Event()

    @contextlib.contextmanager
    def record_waiting_state(session: Session) -> Iterator[None]:
        with begin_waiting(session):
            waiting.set()
            try:
                yield
            finally:
                waiting.clear()

    monkeypatch.setattr(Session, "waiting", record_waiting_state)
    [item] = workpool.enqueue(script=[make_bash_call("echo one", permission="ask")])
    async with workpool.pool(make_toolset(), stall_timeout=600.0):
        async with asyncio.timeout(WAIT_SECONDS):
            await waiting.wait()
        async with automatic_confirmations(workpool, item.session_id, "allow"):
            finished = await workpool.wait_for(SessionFinished)
    assert not waiting.is_set()
    assert finished.outcome == "completed"
    assert list_answers_in_call_order(workpool.server.events(item.session_id)) == [("one\n", False)]


async def test_session_whose_command_does_not_end_is_stalled(
    workpool: Kit, make_toolset: Make
) -> None:
    result = await workpool.run_session(
        make_toolset(), script=[make_bash_call("sleep 600")], stall_timeout=1.0
    )
    assert result.outcome == "stalled"
    assert list_answers_in_call_order(result.events) == []


async def test_call_of_tool_owned_by_another_client_is_left_to_that_client(
    workpool: Kit, make_toolset: Make
) -> None:
    script = [{"name": "browse", "input": {}, "custom": True}, make_bash_call("echo after")]
    [item] = workpool.enqueue(script=script)
    async with workpool.pool(make_toolset()), WorkClient(workpool.settings()) as client:
        events = client.events(item.session_id)
        async with asyncio.timeout(WAIT_SECONDS), events.stream() as stream:
            async for event in stream:
                if event["type"] == "agent.custom_tool_use":
                    reply = {"custom_tool_use_id": event["id"], "content": []}
                    await events.send({"type": "user.custom_tool_result", **reply})
                    break
        await workpool.wait_for(SessionFinished)
    assert list_answers_in_call_order(workpool.server.events(item.session_id))[1] == (
        "after\n",
        False,
    )


@pytest.mark.parametrize(
    "fault", [lost(), lost(applied=False), status(503), status(503, applied=True), status(429)]
)
async def test_tool_call_has_one_execution_and_result_despite_lost_answers(
    workpool: Kit, make_toolset: Make, tmp_path: Path, fault: Any
) -> None:
    workpool.faults.add(fault, "send", times=2)
    workpool.faults.add(lost(), "stream", "events", times=2)
    result = await workpool.run_session(
        make_toolset(), script=[make_bash_call(f"echo {n} >> log") for n in range(3)]
    )
    assert result.outcome == "completed"
    assert list_answers_in_call_order(result.events) == [("(no output)", False)] * 3
    log = session_directory(tmp_path, result.item.session_id) / "workspace/log"
    assert log.read_text() == "0\n1\n2\n"


async def test_error_is_sent_instead_of_tool_result_that_control_plane_refuses(
    workpool: Kit, make_toolset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_call_answerer, "REFUSED_SECONDS", 0.0)
    workpool.faults.add(status(400), "send", times=1)
    result = await workpool.run_session(
        make_toolset(), script=[make_bash_call("echo 1"), make_bash_call("echo 2")]
    )
    assert list_answers_in_call_order(result.events) == [
        (tool_call_answerer.RESULT_REFUSED, True),
        ("2\n", False),
    ]


async def test_tool_result_is_sent_again_if_control_plane_refuses_it_once_with_400(
    workpool: Kit, make_toolset: Make
) -> None:
    workpool.faults.add(status(400), "send", times=1)
    result = await workpool.run_session(make_toolset(), script=[make_bash_call("echo 1")])
    assert list_answers_in_call_order(result.events) == [("1\n", False)]


async def test_result_that_cannot_be_sent_is_kept_and_sent_by_next_run(
    workpool: Kit, make_toolset: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_call_answerer, "POST_SECONDS", 0.0)
    monkeypatch.setattr("workpool.pool.session_backend.EVENTS_SECONDS", 0.2)
    toolset = make_toolset()
    with workpool.faults.add(status(500), "send"):
        result = await workpool.run_session(toolset, script=[make_bash_call("echo 1 | tee -a log")])
    assert result.outcome == "released"
    expire_lease(workpool.server, result.item.id)
    async with workpool.pool(toolset):
        await workpool.wait_for(SessionFinished, count=2)
    assert list_answers_in_call_order(workpool.server.events(result.item.session_id)) == [
        ("1\n", False)
    ]
    log = session_directory(tmp_path, result.item.session_id) / "workspace/log"
    assert log.read_text() == "1\n"


async def create_journal_of_earlier_worker(folder: Path) -> CallJournal:
    """Create the journal that an earlier worker would have left."""
    await asyncio.to_thread(folder.mkdir, parents=True)
    journal = CallJournal(folder / "journal", DaemonThreads("test", 2))
    await journal.open_directory()
    return journal


async def wait_for_ready_file(tmp_path: Path, session: str) -> None:
    """Wait until a command of the session has created the file `ready`."""
    await wait_for_file(session_directory(tmp_path, session) / "workspace/ready")


async def wait_for_file(file: Path) -> None:
    """Wait until a command of the session has created this file."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not file.exists():  # noqa: ASYNC110, ASYNC240 - there is no event for a new file
            await asyncio.sleep(0.01)


async def test_command_interrupted_by_user_ends_with_error_result(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    [item] = workpool.enqueue(
        script=[make_bash_call("touch ready; sleep 600"), make_bash_call("echo never")]
    )
    async with workpool.pool(make_toolset()), WorkClient(workpool.settings()) as client:
        await wait_for_ready_file(tmp_path, item.session_id)
        await client.events(item.session_id).send({"type": "user.interrupt"})
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    [(text, error)] = list_answers_in_call_order(workpool.server.events(item.session_id))
    assert error
    assert "interrupted" in text


async def test_forced_stop_ends_session_without_result_for_current_tool_call(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    script = [
        make_bash_call("echo $$ > pid; touch ready; sleep 600"),
        make_bash_call("echo never >> log"),
    ]
    [item] = workpool.enqueue(script=script)
    workspace = session_directory(tmp_path, item.session_id) / "workspace"
    async with workpool.pool(make_toolset()):
        await wait_for_ready_file(tmp_path, item.session_id)
        workpool.stop(item, force=True)
        finished = await workpool.wait_for(SessionFinished)
        assert finished.outcome == "stopped"
    assert list_answers_in_call_order(workpool.server.events(item.session_id)) == []
    assert not (workspace / "log").exists()
    shell = Path(f"/proc/{(workspace / 'pid').read_text().strip()}")
    async with asyncio.timeout(WAIT_SECONDS):
        while shell.exists():  # noqa: ASYNC110, ASYNC240 - there is no event for this process
            await asyncio.sleep(0.01)


async def test_two_workers_with_one_session_run_no_call_twice(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    lines = [str(number) for number in range(8)]
    script = [
        make_bash_call("touch ready; sleep 600"),
        *(make_bash_call(f"echo {line} >> log") for line in lines),
    ]
    [item] = workpool.enqueue(script=script)
    async with workpool.pool(make_toolset(), concurrency=1):
        await wait_for_ready_file(tmp_path, item.session_id)
        # Expire the lease of the first worker, which continues to run.
        expire_lease(workpool.server, item.id)
        async with workpool.pool(make_toolset()):
            await workpool.wait_for(SessionFinished, count=2)
    answers = list_answers_in_call_order(workpool.server.events(item.session_id))
    assert len(answers) == len(script)
    assert answers[0] == (tool_call_answerer.UNKNOWN_OUTCOME, True)
    log = session_directory(tmp_path, item.session_id) / "workspace/log"
    done = log.read_text().split() if log.exists() else []
    assert len(done) == len(set(done))
    succeeded = [line for line, (_, error) in zip(lines, answers[1:], strict=True) if not error]
    assert set(succeeded) <= set(done)


async def test_stop_request_ends_session_after_its_running_call(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    script = [
        make_bash_call(f"touch ready; {WAIT_FOR_GO}; echo done"),
        make_bash_call("echo never"),
    ]
    [item] = workpool.enqueue(script=script)
    async with workpool.pool(make_toolset()):
        await wait_for_ready_file(tmp_path, item.session_id)
        workpool.stop(item)
        await workpool.wait_for(StopRequested)
        (session_directory(tmp_path, item.session_id) / "workspace/go").touch()
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "stopped"
    assert list_answers_in_call_order(workpool.server.events(item.session_id)) == [
        ("done\n", False)
    ]


async def test_drain_finishes_current_tool_call_and_leaves_others_to_next_worker(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    script = [
        make_bash_call(f"touch ready; {WAIT_FOR_GO}; echo 1 | tee -a log"),
        make_bash_call("echo 2 | tee -a log"),
    ]
    [item] = workpool.enqueue(script=script)
    toolset = make_toolset()
    async with workpool.pool(toolset) as pool:
        await wait_for_ready_file(tmp_path, item.session_id)
        pool.request_drain(timeout=None)
        (session_directory(tmp_path, item.session_id) / "workspace/go").touch()
    expire_lease(workpool.server, item.id)
    async with workpool.pool(toolset):
        await workpool.wait_for(SessionFinished, count=2)
    assert [end.outcome for end in workpool.recorder.of(SessionFinished)] == [
        *("released", "completed"),
    ]
    assert list_answers_in_call_order(workpool.server.events(item.session_id)) == [
        ("1\n", False),
        ("2\n", False),
    ]
    log = session_directory(tmp_path, item.session_id) / "workspace/log"
    assert log.read_text() == "1\n2\n"


async def test_call_that_crashed_worker_began_is_answered_with_error_and_not_run_again(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    [item] = workpool.enqueue(
        script=[make_bash_call("echo 1 >> log"), make_bash_call("echo 2 >> log")]
    )
    [call] = [e["id"] for e in workpool.server.events(item.session_id) if "name" in e]
    folder = session_directory(tmp_path, item.session_id)
    journal = await create_journal_of_earlier_worker(folder)
    # Prepare the journal of a worker that has crashed during this call.
    await journal.begin_call(call)
    async with workpool.pool(make_toolset()):
        await workpool.wait_for(SessionFinished)
    answers = list_answers_in_call_order(workpool.server.events(item.session_id))
    assert answers == [(tool_call_answerer.UNKNOWN_OUTCOME, True), ("(no output)", False)]
    assert (folder / "workspace/log").read_text() == "2\n"


async def test_result_computed_before_crash_is_sent_without_second_run(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    [item] = workpool.enqueue(script=[make_bash_call("echo 1 >> log")])
    [call] = [e["id"] for e in workpool.server.events(item.session_id) if "name" in e]
    folder = session_directory(tmp_path, item.session_id)
    journal = await create_journal_of_earlier_worker(folder)
    await journal.begin_call(call)
    await journal.store_result(call, ToolResult.from_value("computed before"))
    async with workpool.pool(make_toolset()):
        await workpool.wait_for(SessionFinished)
    assert list_answers_in_call_order(workpool.server.events(item.session_id)) == [
        ("computed before", False)
    ]
    assert not (folder / "workspace/log").exists()


async def test_interrupted_calls_that_earlier_worker_began_are_all_answered(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    [item] = workpool.enqueue()
    use = {"type": "agent.tool_use", "name": "Bash", "input": {"command": "echo never"}}
    idle = {"type": "session.status_idle", "stop_reason": {"type": "end_turn"}}
    calls = workpool.server.emit(item.session_id, use, use)
    folder = session_directory(tmp_path, item.session_id)
    journal = await create_journal_of_earlier_worker(folder)
    for call in calls:
        await journal.begin_call(str(call["id"]))
    await journal.store_result(str(calls[1]["id"]), ToolResult.from_value("computed before"))
    async with workpool.pool(make_toolset()), WorkClient(workpool.settings()) as client:
        await client.events(item.session_id).send({"type": "user.interrupt"})
        workpool.server.emit(item.session_id, idle)
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert len(list_answers_in_call_order(workpool.server.events(item.session_id))) == 2


async def test_call_is_not_executed_if_another_machine_may_have_begun_it(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    [item] = workpool.enqueue(
        script=[make_bash_call("touch ready; sleep 600"), make_bash_call("echo 2")]
    )
    async with workpool.pool(make_toolset()) as pool:
        await wait_for_ready_file(tmp_path, item.session_id)
        await pool.drain(timeout=0)
    expire_lease(workpool.server, item.id)
    async with workpool.pool(make_toolset(state=str(tmp_path / "elsewhere"))):
        await workpool.wait_for(SessionFinished, count=2)
    answers = list_answers_in_call_order(workpool.server.events(item.session_id))
    assert answers == [(tool_call_answerer.UNKNOWN_OUTCOME, True), ("2\n", False)]


async def test_call_that_was_begun_on_another_machine_is_not_executed_again(
    workpool: Kit, make_toolset: Make, tmp_path: Path
) -> None:
    """The second of three runs is on another machine, so the local journal lacks its call."""
    side = tmp_path / "side"
    ready = [tmp_path / "ready1", tmp_path / "ready2"]
    script = [
        make_bash_call(f"touch {ready[0]}; sleep 600"),
        make_bash_call(f"echo 2 >> {side}; touch {ready[1]}; sleep 600"),
        make_bash_call("echo 3"),
    ]
    [item] = workpool.enqueue(script=script)
    for state, begun in zip(("here", "elsewhere"), ready, strict=True):
        async with workpool.pool(make_toolset(state=str(tmp_path / state))) as pool:
            await wait_for_file(begun)
            await pool.drain(timeout=0)
        expire_lease(workpool.server, item.id)
    async with workpool.pool(make_toolset(state=str(tmp_path / "here"))):
        await workpool.wait_for(SessionFinished, count=3)
    answers = list_answers_in_call_order(workpool.server.events(item.session_id))
    assert answers == [
        (tool_call_answerer.UNKNOWN_OUTCOME, True),
        (tool_call_answerer.UNKNOWN_OUTCOME, True),
        ("3\n", False),
    ]
    assert side.read_text() == "2\n"


async def test_call_is_not_executed_until_metadata_contain_journal_name(
    workpool: Kit, make_toolset: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def raise_transient_error(*_: object) -> None:
        raise TransientError("update", None, "no answer", reason="network")

    toolset = make_toolset()
    with monkeypatch.context() as patch:
        patch.setattr(Session, "update_metadata", raise_transient_error)
        result = await workpool.run_session(toolset, script=[make_bash_call("echo 1 | tee -a log")])
    assert result.outcome == "released"
    folder = session_directory(tmp_path, result.item.session_id)
    assert not (folder / "workspace/log").exists()
    expire_lease(workpool.server, result.item.id)
    async with workpool.pool(toolset):
        await workpool.wait_for(SessionFinished, count=2)
    assert list_answers_in_call_order(workpool.server.events(result.item.session_id)) == [
        ("1\n", False)
    ]


async def test_tool_result_is_sent_although_full_disk_prevents_storing_it(
    workpool: Kit, make_toolset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def raise_disk_full(*_: object) -> None:
        raise full

    monkeypatch.setattr(CallJournal, "_write_temporary_file", raise_disk_full)
    result = await workpool.run_session(make_toolset(), script=[make_bash_call("echo 1")])
    assert result.outcome == "released"
    assert list_answers_in_call_order(result.events) == []
    monkeypatch.undo()
    expire_lease(workpool.server, result.item.id)

    monkeypatch.setattr("workpool.testing.kit.WAIT_SECONDS", WAIT_SECONDS)
    monkeypatch.setattr(CallJournal, "_write_result", raise_disk_full)
    async with workpool.pool(make_toolset()):
        await workpool.wait_for(SessionFinished, count=2)
    assert list_answers_in_call_order(workpool.server.events(result.item.session_id)) == [
        ("1\n", False)
    ]
    assert workpool.recorder.of(SessionFinished)[-1].outcome == "completed"


async def test_tool_calls_of_terminated_session_are_neither_executed_nor_answered(
    workpool: Kit, make_toolset: Make
) -> None:
    [item] = workpool.enqueue()
    workpool.server.emit(
        item.session_id,
        {"type": "agent.tool_use", "name": "Bash", "input": {"command": "echo never"}},
        {"type": "session.status_terminated"},
    )
    async with workpool.pool(make_toolset(max_idle=float("inf"))):
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert list_answers_in_call_order(workpool.server.events(item.session_id)) == []


async def test_idle_time_of_session_is_counted_from_last_end_of_turn(
    workpool: Kit, make_toolset: Make
) -> None:
    [item] = workpool.enqueue()
    idle = {"type": "session.status_idle", "stop_reason": {"type": "end_turn"}}
    use = {"type": "agent.tool_use", "name": "Bash", "input": {"command": "echo 1"}}
    workpool.server.emit(item.session_id, idle, {"type": "session.status_running"})
    async with workpool.pool(make_toolset()), WorkClient(workpool.settings()) as client:
        async with asyncio.timeout(WAIT_SECONDS), client.events(item.session_id).stream() as stream:
            async for event in stream:
                if event["type"] == "session.status_running":
                    workpool.server.emit(item.session_id, use)
                if event["type"] == "user.tool_result":
                    break
        assert not workpool.recorder.of(SessionFinished)
        workpool.server.emit(item.session_id, idle)
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "completed"
