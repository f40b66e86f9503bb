"""Fixtures: the tools of a session in a temporary workspace, without a control plane."""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from workpool_toolset.command_sandbox import (
    BASH,
    Bubblewrap,
    CommandIsolation,
    NoIsolation,
    ProcessLimits,
    find_sandbox_problem,
)
from workpool_toolset.search_tools import SandboxCommand, SearchTools
from workpool_toolset.shell import BashShell
from workpool_toolset.toolbox import (
    CallLimits,
    Toolbox,
    ToolCall,
    ToolThreads,
    running_tool_threads,
)
from workpool_toolset.workspace import Workspace, WorkspaceRoot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from workpool_toolset.tool_result import ToolResult

SESSION = "sess_1"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test that needs bubblewrap with `trial`, which excludes it from a plain run.

    No Python package provides the program bubblewrap, so a machine may lack it.
    """
    if "sandbox" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.trial)


class FakeAgent:
    """Calls the tools of a session as an agent does, and returns their results."""

    def __init__(self, toolbox: Toolbox, folder: Path, shown: str) -> None:
        self.toolbox = toolbox
        self.folder = folder
        self.shown = shown

    async def call_tool(self, name: str, *, custom: bool = False, **fields: Any) -> ToolResult:
        call = ToolCall(id="evt_1", name=name, input=fields, custom=custom, session=SESSION)
        return await self.toolbox.run_tool_call(call)

    async def expect_tool_success(self, name: str, **fields: Any) -> str:
        """Call a tool, check that it succeeds, and return the text of its result."""
        result = await self.call_tool(name, **fields)
        assert not result.is_error, result
        return result_text(result)

    async def expect_tool_error(self, name: str, **fields: Any) -> str:
        """Call a tool, check that it fails, and return the text of its error."""
        result = await self.call_tool(name, **fields)
        assert result.is_error, result
        return result_text(result)


def result_text(result: ToolResult) -> str:
    return "\n".join(str(block.get("text")) for block in result.content)


def create_fake_agent(
    isolation: CommandIsolation,
    folder: Path,
    roots: Sequence[WorkspaceRoot] = (),
    *,
    custom: Any = None,
    bounds: CallLimits = CallLimits(bash_seconds=40.0, tool_seconds=55.0),  # noqa: B008 - frozen
    threads: ToolThreads,
) -> FakeAgent:
    owner = isolation.owner_of_session_files(SESSION)
    if owner:
        os.chown(folder, *owner)
    shown = isolation.workspace_path(folder)
    workspace = Workspace([WorkspaceRoot(shown, folder, owner=owner), *roots])
    prefix, environment = (
        isolation.command_line(SESSION, folder, ()),
        isolation.command_environment_variables(None),
    )
    sandbox = SandboxCommand(prefix, environment) if isolation.is_sandboxed else None
    toolbox = Toolbox(
        workspace,
        BashShell([*prefix, *BASH], environment, None if sandbox else folder),
        SearchTools(workspace, sandbox),
        custom=custom or {},
        bounds=bounds,
        threads=threads,
    )
    return FakeAgent(toolbox, folder, shown)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Bubblewrap:
    """A sandbox that works on this machine. The test is skipped where bubblewrap does not work."""
    sandbox = Bubblewrap(ProcessLimits(memory_mb=1024, cpu_seconds=20, processes=64, file_mb=64))
    if problem := asyncio.run(find_sandbox_problem(sandbox, tmp_path_factory.mktemp("probe"))):
        pytest.skip(f"bubblewrap does not work here: {problem}")
    return sandbox


def remove_directory(folder: Path) -> None:
    """Remove a directory with `rm -rf`, which can remove deeper trees than Python."""
    subprocess.run(["/bin/rm", "-rf", folder], check=True)  # noqa: S603 - a directory of the test


@pytest.fixture
def workspace_directory(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "workspace"
    folder.mkdir(mode=0o700)
    yield folder
    remove_directory(folder)


@pytest.fixture
async def tool_threads() -> AsyncIterator[ToolThreads]:
    async with running_tool_threads() as threads:
        yield threads


@pytest.fixture
async def fake_agent_factory(
    workspace_directory: Path, tool_threads: ToolThreads
) -> AsyncIterator[Callable[..., FakeAgent]]:
    """Return a function that makes a `FakeAgent` with the given isolation and options."""
    agents: list[FakeAgent] = []

    def create_agent(isolation: CommandIsolation = NoIsolation(), **options: Any) -> FakeAgent:  # noqa: B008 - frozen
        agents.append(
            create_fake_agent(isolation, workspace_directory, **{"threads": tool_threads} | options)
        )
        return agents[-1]

    yield create_agent
    for agent in agents:
        await agent.toolbox.close_shell()


@pytest.fixture(
    params=["agent_without_sandbox", pytest.param("agent_with_sandbox", marks=pytest.mark.trial)]
)
def agent(request: pytest.FixtureRequest) -> FakeAgent:
    """A `FakeAgent`. Each test that uses it runs twice: without and with a sandbox."""
    chosen: FakeAgent = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture
async def agent_without_sandbox(
    workspace_directory: Path, tool_threads: ToolThreads
) -> AsyncIterator[FakeAgent]:
    """A `FakeAgent` whose commands run without isolation."""
    agent = create_fake_agent(NoIsolation(), workspace_directory, threads=tool_threads)
    yield agent
    await agent.toolbox.close_shell()


@pytest.fixture
async def agent_with_sandbox(
    sandbox: Bubblewrap, workspace_directory: Path, tool_threads: ToolThreads
) -> AsyncIterator[FakeAgent]:
    """A `FakeAgent` whose commands run in a sandbox."""
    agent = create_fake_agent(sandbox, workspace_directory, threads=tool_threads)
    yield agent
    await agent.toolbox.close_shell()
