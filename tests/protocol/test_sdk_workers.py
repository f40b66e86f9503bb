"""The vendor's own workers, in Python and TypeScript, each in a whole conversation.

The application is a client of the vendor's SDK too: it creates the environment and the session, and
confirms tool uses. Only the control plane belongs to this project.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from aiohttp import web
from anthropic import AsyncAnthropic, beta_async_tool
from anthropic.lib.tools.agent_toolset import AgentToolContext, beta_agent_toolset_20260401

from workpool.server import ControlPlane

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    Worker = Callable[[str], AbstractAsyncContextManager[None]]

# The time limit includes the download of npm packages.
pytestmark = [pytest.mark.trial, pytest.mark.timeout(300)]

APPLICATION, KEY = "token-of-the-application", "key-of-the-environment"
NODE_MAJOR_MIN = 20
TYPESCRIPT_SDK = "@anthropic-ai/sdk@1.14.0"
"""Pinned, so that a new release cannot fail the trials; raise it deliberately."""
SCRIPT: list[dict[str, Any]] = [
    {"name": "write", "input": {"file_path": "note", "content": "hello\n"}},
    {"name": "bash", "input": {"command": "cat note; echo world >>note"}},
    {"name": "bash", "input": {"command": "cat note"}, "permission": "ask"},
    {"name": "bash", "input": {"command": "rm note"}, "permission": "ask"},
    {"name": "weather", "input": {"city": "Ulm"}, "custom": True},
    {"name": "read", "input": {"file_path": "note"}},
]


class WorkerCallRecorder:
    """Middleware that records the calls of a worker, and the kind of credential of each call.

    The kind is "key" for the environment's key, and "item" for the token of an item.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    @web.middleware
    async def handle_request(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # A call is recorded as its method and its path without ids.
        words = request.path.removeprefix("/v1/").split("/")
        call = f"{request.method} {'/'.join(word for word in words if '_' not in word)}"
        if token != APPLICATION:
            self.seen.add(("key" if token == KEY else "item", call))
        return await handler(request)


@pytest.fixture
def call_recorder() -> WorkerCallRecorder:
    return WorkerCallRecorder()


@pytest.fixture
async def control_plane(call_recorder: WorkerCallRecorder) -> AsyncIterator[ControlPlane]:
    tokens = {APPLICATION: None, KEY: None}
    async with ControlPlane(tokens=tokens, middlewares=[call_recorder.handle_request]) as plane:
        yield plane


@pytest.fixture
async def application_client(control_plane: ControlPlane) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(
        api_key=APPLICATION,
        base_url=control_plane.anthropic_base_url.removesuffix("/v1"),
        _strict_response_validation=True,
    ) as client:
        yield client


async def confirm_first_and_deny_second_tool_use(
    application_client: AsyncAnthropic, session_id: str
) -> None:
    """Allow the first tool use that asks for confirmation, deny the second one, and return.

    The function returns when the turn of the agent ends.
    """
    verdicts: list[Literal["allow", "deny"]] = ["allow", "deny"]
    events = application_client.beta.sessions.events
    seen: set[str] = set()

    async def answer_event_and_return_whether_turn_ended(event: Any) -> bool:
        if event.type == "agent.tool_use" and event.evaluated_permission == "ask":
            await events.send(
                session_id,
                events=[{"type": "user.tool_confirmation", "tool_use_id": event.id,
                         "result": verdicts.pop(0)}],
            )  # fmt: skip
        ended: bool = event.type == "session.status_idle" and (event.stop_reason.type == "end_turn")
        return ended

    async def iterate_past_and_new_events() -> AsyncGenerator[Any, None]:
        """Yield all events; the stream is opened before the history is read, so none is missed."""
        async with await events.stream(session_id) as stream:
            async for past in events.list(session_id):
                yield past
            async for event in stream:
                yield event

    async with aclosing(iterate_past_and_new_events()) as events_in_order:
        async for event in events_in_order:
            if event.id not in seen and await answer_event_and_return_whether_turn_ended(event):
                return
            seen.add(event.id)


def get_text_of_event_content(event: dict[str, Any]) -> str:
    text: str = event["content"][0]["text"]
    return text.strip()


@beta_async_tool
async def weather(city: str) -> str:
    """Return the weather.

    Args:
        city: Where.
    """
    return f"rain in {city}"


@pytest.fixture
def python_worker(control_plane: ControlPlane, tmp_path: Path) -> Worker:
    def make_agent_tools(context: AgentToolContext) -> list[Any]:
        return [*beta_agent_toolset_20260401(context), weather]

    base_url = control_plane.anthropic_base_url.removesuffix("/v1")

    @asynccontextmanager
    async def run_worker(environment_id: str) -> AsyncIterator[None]:
        async with (
            AsyncAnthropic(auth_token=KEY, base_url=base_url) as client,
            asyncio.TaskGroup() as group,
        ):
            work = client.beta.environments.work.worker(
                environment_id=environment_id,
                environment_key=KEY,
                workdir=tmp_path,
                max_idle=0.05,
                tools=make_agent_tools,
            )
            running = group.create_task(work.run())
            yield
            running.cancel()

    return run_worker


@pytest.fixture(scope="session")
def typescript_worker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the TypeScript worker and the SDK that it imports."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    version = subprocess.check_output([node, "--version"], text=True)  # noqa: S603 - found on PATH
    if int(version.lstrip("v").partition(".")[0]) < NODE_MAJOR_MIN:
        pytest.skip(f"node {version.strip()} is older than {NODE_MAJOR_MIN}")
    project = tmp_path_factory.mktemp("node")
    shutil.copy(Path(__file__).with_name("environment_worker.mjs"), project)
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", TYPESCRIPT_SDK]
    try:
        installed = subprocess.run(  # noqa: S603 - found on PATH
            install, cwd=project, capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install {TYPESCRIPT_SDK} within 120 s")
    if installed.returncode:
        problem = (installed.stderr.strip().splitlines() or ["no message"])[0]
        pytest.skip(f"npm could not install {TYPESCRIPT_SDK}: {problem}")
    return project


@pytest.fixture
def typescript_worker(
    control_plane: ControlPlane, tmp_path: Path, typescript_worker_folder: Path
) -> Worker:
    base_url = control_plane.anthropic_base_url.removesuffix("/v1")

    @asynccontextmanager
    async def run_worker(environment_id: str) -> AsyncIterator[None]:
        process = await asyncio.create_subprocess_exec(
            "node", "environment_worker.mjs", base_url, environment_id, KEY, str(tmp_path),
            cwd=typescript_worker_folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            output, _ = await asyncio.wait_for(process.communicate(), 30)
            print(output.decode())  # noqa: T201 - pytest shows it when the test fails
        assert process.returncode == 0

    return run_worker


@pytest.fixture(params=["python_worker", "typescript_worker"])
def start_worker(request: pytest.FixtureRequest) -> Worker:
    """Return a context manager that runs the Python or the TypeScript worker in an environment."""
    started: Worker = request.getfixturevalue(request.param)
    return started


@pytest.fixture
async def environment_id(application_client: AsyncAnthropic) -> str:
    environment = await application_client.beta.environments.create(
        name="mine", config={"type": "self_hosted"}
    )
    new_id: str = environment.id
    return new_id


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true. The caller sets a time limit with `asyncio.timeout`."""
    while not condition():  # noqa: ASYNC110 - a worker is a process that sets no event here
        await asyncio.sleep(0.02)


async def test_sdk_worker_completes_a_conversation(
    control_plane: ControlPlane,
    application_client: AsyncAnthropic,
    start_worker: Worker,
    environment_id: str,
    call_recorder: WorkerCallRecorder,
    tmp_path: Path,
) -> None:
    async with start_worker(environment_id), asyncio.timeout(120):
        session = await application_client.beta.sessions.create(
            agent="agent_1",
            environment_id=environment_id,
            metadata={"job": "report"},
            extra_body={"script": SCRIPT},
        )
        await confirm_first_and_deny_second_tool_use(application_client, session.id)
        await wait_until(lambda: control_plane.summary().stopped == 1)
        # The session has no unfinished item now, so the next message creates an item.
        await application_client.beta.sessions.events.send(
            session.id,
            events=[{"type": "user.message", "content": [{"type": "text", "text": "Thanks."}]}],
        )
        await wait_until(lambda: control_plane.summary().stopped == 2)

    events = application_client.beta.sessions.events
    stored = [event.to_dict(mode="json") async for event in events.list(session.id)]
    uses = [event for event in stored if event["type"] == "agent.tool_use"]
    answers = {"user.tool_result", "agent.tool_result"}
    results: dict[object, dict[str, Any]] = {
        event["tool_use_id"]: event for event in stored if event["type"] in answers
    }
    assert [use["name"] for use in uses] == ["write", "bash", "bash", "bash", "read"]
    results_in_order = [results[use["id"]] for use in uses]
    # The tool use that was denied is the fourth one. The control plane itself wrote the result of
    # this tool use, hence the type `agent.tool_result`.
    assert [event["type"] for event in results_in_order] == [
        *["user.tool_result"] * 3, "agent.tool_result", "user.tool_result"
    ]  # fmt: skip
    assert [event["is_error"] for event in results_in_order] == [False, False, False, True, False]
    assert [get_text_of_event_content(event) for event in results_in_order[1:3]] == [
        "hello",
        "hello\nworld",
    ]
    (custom,) = [event for event in stored if event["type"] == "user.custom_tool_result"]
    assert get_text_of_event_content(custom) == "rain in Ulm"

    assert control_plane.summary()[:3] == (2, 2, 0)
    assert control_plane.summary().overlapping == 0
    assert call_recorder.seen == {
        ("key", "GET environments/work/poll"),
        ("key", "POST environments/work/ack"),
        ("item", "POST environments/work/heartbeat"),
        ("item", "POST environments/work/stop"),
        ("item", "GET sessions"),
        ("item", "GET sessions/events"),
        ("item", "GET sessions/events/stream"),
        ("item", "POST sessions/events"),
    }
    assert (tmp_path / "note").read_text() == "hello\nworld\n"


@dataclass(frozen=True)
class SessionAwaitingConfirmation:
    """A session whose worker waits for a confirmation.

    Attributes:
        state: Returns the current state of the item.
    """

    session_id: str
    work_id: str
    state: Callable[[], str]


@pytest.fixture
async def session_awaiting_confirmation(
    control_plane: ControlPlane,
    application_client: AsyncAnthropic,
    start_worker: Worker,
    environment_id: str,
    call_recorder: WorkerCallRecorder,
) -> AsyncIterator[SessionAwaitingConfirmation]:
    ask = {"name": "bash", "input": {"command": "ls"}, "permission": "ask"}
    async with start_worker(environment_id), asyncio.timeout(120):
        session = await application_client.beta.sessions.create(
            agent="agent_1", environment_id=environment_id, extra_body={"script": [ask]}
        )
        (item,) = control_plane.operations.list_items(environment_id).items
        # The worker opens its event stream before it reads the history, so the stream is open now.
        await wait_until(lambda: ("item", "GET sessions/events") in call_recorder.seen)
        yield SessionAwaitingConfirmation(
            session.id,
            item.id,
            lambda: control_plane.operations.get_item(environment_id, item.id).state,
        )


async def test_sdk_worker_stops_item_of_archived_session_at_once(
    application_client: AsyncAnthropic,
    session_awaiting_confirmation: SessionAwaitingConfirmation,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert (
        await application_client.beta.sessions.archive(session_awaiting_confirmation.session_id)
    ).status == "terminated"
    # The worker stops the item before its next heartbeat is due, so a heartbeat's answer cannot be
    # the reason for the stop.
    async with asyncio.timeout(20):
        await wait_until(lambda: session_awaiting_confirmation.state() == "stopped")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_sdk_worker_stops_item_after_heartbeat_reports_stop_request(
    control_plane: ControlPlane,
    session_awaiting_confirmation: SessionAwaitingConfirmation,
    environment_id: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The answer to the next heartbeat, at most 30 s later, reports the stop to the worker."""
    control_plane.operations.stop_item(environment_id, session_awaiting_confirmation.work_id)
    assert session_awaiting_confirmation.state() == "stopping"
    async with asyncio.timeout(90):
        await wait_until(lambda: session_awaiting_confirmation.state() == "stopped")
    kinds = [
        record.kind
        for record in control_plane.history.records_of_item(session_awaiting_confirmation.work_id)
    ]
    # The record `stopped` shows that the worker stopped the item. If the lease had ended instead,
    # the last record would be `lapsed`.
    assert kinds[-2:] == ["heartbeat", "stopped"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_sdk_worker_with_item_secret_instead_of_key_runs_item(
    control_plane: ControlPlane,
    application_client: AsyncAnthropic,
    environment_id: str,
    call_recorder: WorkerCallRecorder,
    tmp_path: Path,
) -> None:
    """A parent polls with the environment's key. Its child runs the item with the item's secret."""
    base_url = control_plane.anthropic_base_url.removesuffix("/v1")
    await application_client.beta.sessions.create(
        agent="agent_1", environment_id=environment_id, extra_body={"script": SCRIPT[:2]}
    )
    async with (
        AsyncAnthropic(auth_token=KEY, base_url=base_url) as parent,
        AsyncAnthropic(auth_token="opens-nothing", base_url=base_url) as child,  # noqa: S106 - a refused token
    ):
        async for item in parent.beta.environments.work.poller(
            environment_id=environment_id, environment_key=KEY, block_ms=None, drain=True,
            auto_stop=False,
        ):  # fmt: skip
            await child.beta.environments.work.worker(workdir=tmp_path, max_idle=0.05).handle_item(
                work_id=item.id,
                environment_id=item.environment_id,
                session_id=item.data.id,
                work_secret=item.secret,
            )
    assert (tmp_path / "note").read_text() == "hello\nworld\n"
    assert control_plane.summary()[:2] == (1, 1)
    assert {call for kind, call in call_recorder.seen if kind == "key"} == {
        "GET environments/work/poll",
        "POST environments/work/ack",
    }
