"""Fixtures: the plugin's tools on a temporary workspace, without a control plane."""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from workpool_toolset.isolation import BASH, Bare, Bubblewrap, Isolation, Limits, problem
from workpool_toolset.search import Sandboxed, Search
from workpool_toolset.shell import Shell
from workpool_toolset.tools import Bounds, Threads, Toolbox, ToolCall, started_threads
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


class Agent:
    """An agent that calls tools and reads their results."""

    def __init__(self, toolbox: Toolbox, folder: Path, shown: str) -> None:
        self.toolbox = toolbox
        self.folder = folder
        self.shown = shown

    async def call(self, name: str, *, custom: bool = False, **fields: Any) -> Result:
        call = ToolCall(id="evt_1", name=name, input=fields, custom=custom, session=SESSION)
        return await self.toolbox.run(call)

    async def says(self, name: str, **fields: Any) -> str:
        """Call a tool that must succeed, and return the text of its result."""
        result = await self.call(name, **fields)
        assert not result.is_error, result
        return text(result)

    async def fails(self, name: str, **fields: Any) -> str:
        """Call a tool that must fail, and return the text of its error."""
        result = await self.call(name, **fields)
        assert result.is_error, result
        return text(result)


def text(result: Result) -> str:
    return "\n".join(str(block.get("text")) for block in result.content)


def agent_of(
    isolation: Isolation,
    folder: Path,
    roots: Sequence[Root] = (),
    *,
    custom: Any = None,
    bounds: Bounds = Bounds(bash_seconds=20.0, tool_seconds=30.0),  # noqa: B008 - frozen
    threads: Threads,
) -> Agent:
    owner = isolation.owner(SESSION)
    if owner:
        os.chown(folder, *owner)
    shown = isolation.shown(folder)
    workspace = Workspace([Root(shown, folder, owner=owner), *roots])
    prefix, environment = isolation.command(SESSION, folder, ()), isolation.environment(None)
    sandbox = Sandboxed(prefix, environment) if isolation.sandboxed else None
    toolbox = Toolbox(
        workspace,
        Shell([*prefix, *BASH], environment, None if sandbox else folder),
        Search(workspace, sandbox),
        custom=custom or {},
        bounds=bounds,
        threads=threads,
    )
    return Agent(toolbox, folder, shown)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Bubblewrap:
    """A sandbox that works on this machine; without one, the test is skipped with the reason."""
    found = Bubblewrap(Limits(memory_mb=1024, cpu_seconds=20, processes=64, file_mb=64))
    if wrong := asyncio.run(problem(found, tmp_path_factory.mktemp("probe"))):
        pytest.skip(f"bubblewrap does not work here: {wrong}")
    return found


def remove(folder: Path) -> None:
    """Remove a directory as `rm -rf` does, which can remove deeper trees than Python."""
    subprocess.run(["/bin/rm", "-rf", folder], check=True)  # noqa: S603 - the test's own folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "workspace"
    folder.mkdir(mode=0o700)
    yield folder
    remove(folder)


@pytest.fixture
async def threads() -> AsyncIterator[Threads]:
    async with started_threads() as threads:
        yield threads


@pytest.fixture
async def agents(folder: Path, threads: Threads) -> AsyncIterator[Callable[..., Agent]]:
    """Return a function that makes agents: `agents(isolation=…, roots=…, custom=…, bounds=…)`."""
    made: list[Agent] = []

    def make(isolation: Isolation = Bare(), **options: Any) -> Agent:  # noqa: B008 - frozen
        made.append(agent_of(isolation, folder, **{"threads": threads} | options))
        return made[-1]

    yield make
    for agent in made:
        await agent.toolbox.close()


@pytest.fixture(params=["bare", pytest.param("boxed", marks=pytest.mark.trial)])
def agent(request: pytest.FixtureRequest) -> Agent:
    """An agent without a sandbox, then one with a sandbox."""
    found: Agent = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def bare(folder: Path, threads: Threads) -> AsyncIterator[Agent]:
    """An agent whose commands run without isolation."""
    agent = agent_of(Bare(), folder, threads=threads)
    yield agent
    await agent.toolbox.close()


@pytest.fixture
async def boxed(sandbox: Bubblewrap, folder: Path, threads: Threads) -> AsyncIterator[Agent]:
    """An agent whose commands run in a sandbox."""
    agent = agent_of(sandbox, folder, threads=threads)
    yield agent
    await agent.toolbox.close()
