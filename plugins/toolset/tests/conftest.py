"""Fixtures: the plugin's tools on a temporary workspace, without a control plane."""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from workpool_toolset.isolation import (
    BASH,
    Bubblewrap,
    Isolation,
    NoIsolation,
    ProcessLimits,
    find_problem,
)
from workpool_toolset.search import SandboxCommand, SearchTools
from workpool_toolset.shell import BashShell
from workpool_toolset.tools import CallLimits, Toolbox, ToolCall, ToolThreads, started_threads
from workpool_toolset.workspace import Root, Workspace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from workpool_toolset.results import Result

SESSION = "sess_1"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test that needs the sandbox as a trial, since bubblewrap is no Python package."""
    if "sandbox" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.trial)


class AgentStandIn:
    """An agent that calls tools and reads their results."""

    def __init__(self, toolbox: Toolbox, folder: Path, shown: str) -> None:
        self.toolbox = toolbox
        self.folder = folder
        self.shown = shown

    async def call_tool(self, name: str, *, custom: bool = False, **fields: Any) -> Result:
        call = ToolCall(id="evt_1", name=name, input=fields, custom=custom, session=SESSION)
        return await self.toolbox.run(call)

    async def call_successfully(self, name: str, **fields: Any) -> str:
        """Call a tool that must succeed, and return the text of its result."""
        result = await self.call_tool(name, **fields)
        assert not result.is_error, result
        return text_of(result)

    async def call_with_error(self, name: str, **fields: Any) -> str:
        """Call a tool that must fail, and return the text of its error."""
        result = await self.call_tool(name, **fields)
        assert result.is_error, result
        return text_of(result)


def text_of(result: Result) -> str:
    return "\n".join(str(block.get("text")) for block in result.content)


def make_agent(
    isolation: Isolation,
    folder: Path,
    roots: Sequence[Root] = (),
    *,
    custom: Any = None,
    bounds: CallLimits = CallLimits(bash_seconds=20.0, tool_seconds=30.0),  # noqa: B008 - frozen
    threads: ToolThreads,
) -> AgentStandIn:
    owner = isolation.file_owner(SESSION)
    if owner:
        os.chown(folder, *owner)
    shown = isolation.workspace_path(folder)
    workspace = Workspace([Root(shown, folder, owner=owner), *roots])
    prefix, environment = isolation.command_line(SESSION, folder, ()), isolation.environment(None)
    sandbox = SandboxCommand(prefix, environment) if isolation.sandboxed else None
    toolbox = Toolbox(
        workspace,
        BashShell([*prefix, *BASH], environment, None if sandbox else folder),
        SearchTools(workspace, sandbox),
        custom=custom or {},
        bounds=bounds,
        threads=threads,
    )
    return AgentStandIn(toolbox, folder, shown)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Bubblewrap:
    """A sandbox that works on this machine; without one, the test is skipped with the reason."""
    found = Bubblewrap(ProcessLimits(memory_mb=1024, cpu_seconds=20, processes=64, file_mb=64))
    if wrong := asyncio.run(find_problem(found, tmp_path_factory.mktemp("probe"))):
        pytest.skip(f"bubblewrap does not work here: {wrong}")
    return found


def remove_directory(folder: Path) -> None:
    """Remove a directory as `rm -rf` does, which can remove deeper trees than Python."""
    subprocess.run(["/bin/rm", "-rf", folder], check=True)  # noqa: S603 - the test's own folder


@pytest.fixture
def workspace_directory(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "workspace"
    folder.mkdir(mode=0o700)
    yield folder
    remove_directory(folder)


@pytest.fixture
async def tool_threads() -> AsyncIterator[ToolThreads]:
    async with started_threads() as threads:
        yield threads


@pytest.fixture
async def make_agents(
    workspace_directory: Path, tool_threads: ToolThreads
) -> AsyncIterator[Callable[..., AgentStandIn]]:
    """Return a function that makes agents: `agents(isolation=…, roots=…, custom=…, bounds=…)`."""
    made: list[AgentStandIn] = []

    def make(isolation: Isolation = NoIsolation(), **options: Any) -> AgentStandIn:  # noqa: B008 - frozen
        made.append(
            make_agent(isolation, workspace_directory, **{"threads": tool_threads} | options)
        )
        return made[-1]

    yield make
    for agent in made:
        await agent.toolbox.close()


@pytest.fixture(
    params=["agent_without_sandbox", pytest.param("agent_with_sandbox", marks=pytest.mark.trial)]
)
def agent(request: pytest.FixtureRequest) -> AgentStandIn:
    """An agent without a sandbox, then one with a sandbox."""
    found: AgentStandIn = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def agent_without_sandbox(
    workspace_directory: Path, tool_threads: ToolThreads
) -> AsyncIterator[AgentStandIn]:
    """An agent whose commands run without isolation."""
    agent = make_agent(NoIsolation(), workspace_directory, threads=tool_threads)
    yield agent
    await agent.toolbox.close()


@pytest.fixture
async def agent_with_sandbox(
    sandbox: Bubblewrap, workspace_directory: Path, tool_threads: ToolThreads
) -> AsyncIterator[AgentStandIn]:
    """An agent whose commands run in a sandbox."""
    agent = make_agent(sandbox, workspace_directory, threads=tool_threads)
    yield agent
    await agent.toolbox.close()
