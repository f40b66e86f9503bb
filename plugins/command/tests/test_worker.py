"""`workpool run` with the plugin in its own process, which the tests kill."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any

import pytest

from workpool.events import SessionFinished
from workpool_command import Command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from workpool.server import Item
    from workpool.testing import Kit

pytestmark = pytest.mark.acceptance


@asynccontextmanager
async def running_worker(
    kit: Kit, tmp_path: Path, **table: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start `workpool run command` with this table of settings."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    config = tmp_path / "workpool.toml"
    config.write_text("\n".join(["[workpool]", "[workpool.plugin.command]", *lines]))
    given = {
        "WORKPOOL_BASE_URL": kit.server.base_url,
        "WORKPOOL_ENVIRONMENT_ID": kit.server.environments[0],
        "WORKPOOL_TOKEN": kit.server.token,
        "WORKPOOL_METRICS_LISTEN": "off",
        "WORKPOOL_LEASE_TTL": "10",
        "WORKPOOL_CONFIG": str(config),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workpool", "run", "command"),
        env=os.environ | given,
        stderr=DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_commands_of_killed_worker_are_killed(
    kit: Kit, process_view: Any, tmp_path: Path
) -> None:
    script = "sh -c 'echo $$ >>$0; sleep 60' $0 & echo $$ >>$0; wait"
    command = ["sh", "-c", script, str(tmp_path / "pids")]
    async with running_worker(kit, tmp_path, command=command) as process:
        kit.enqueue(2)
        pids = await process_view.wait_for_lines(tmp_path / "pids", 4)
        process.kill()
        await process.wait()
        await process_view.wait_for_end(pids)


LASTING = """
    cat >item; env >env; echo hello; echo started >$0/told
    read go <$0/fifo
"""


async def test_detached_command_of_killed_worker_continues(
    kit: Kit, process_view: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    command = ["sh", "-c", LASTING, str(tmp_path)]
    root = tmp_path / "root"
    async with running_worker(
        kit, tmp_path, command=command, detach=True, root=str(root)
    ) as process:
        [item] = kit.enqueue()
        await process_view.wait_for_lines(tmp_path / "told")
        process.kill()
        await process.wait()
    assert process_state(kit, item) == "active"
    await asyncio.to_thread((tmp_path / "fifo").write_text, "go\n")
    await process_view.wait_for_file(lambda: process_state(kit, item) == "stopped")

    cwd = root / item.session_id
    assert json.loads((cwd / "item").read_text())["id"] == item.id
    assert kit.server.token not in (cwd / "env").read_text()
    assert "WORKPOOL_REDELIVERED=0\n" in (cwd / "env").read_text()
    assert "hello\n" in (cwd / "output.log").read_text()


async def test_detached_command_of_running_worker_is_reaped(
    kit: Kit, process_view: Any, tmp_path: Path
) -> None:
    children, descriptors = process_view.child_processes(), process_view.open_descriptors()
    [item] = kit.enqueue()
    async with kit.pool(Command(command=["true"], detach=True, root=tmp_path)):
        end = await kit.wait_for(SessionFinished, timeout=25)
        await process_view.wait_for_file(lambda: process_state(kit, item) == "stopped")
        # The guard process is the only child process that is left.
        await process_view.wait_for_file(
            lambda: len(process_view.child_processes() - children) == 1
        )

    assert end.outcome == "detached"
    assert process_view.child_processes() == children
    assert process_view.open_descriptors() == descriptors


async def test_detached_command_whose_hold_process_is_refused_releases_session(
    kit: Kit, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(kit.server.token)
    command = Command(command=["true"], detach=True, root=tmp_path)
    async with kit.pool(command, token=None, token_file=token):
        token.write_text("revoked")  # the pool reads the token again only when a call is refused
        [item] = kit.enqueue()
        end = await kit.wait_for(SessionFinished, timeout=25)

    assert (end.outcome, end.seconds < 20) == ("released", True)
    assert str(end.error).startswith("workpool hold: exit status 3; see ")
    assert "401" in (tmp_path / item.session_id / "output.log").read_text()


def process_state(kit: Kit, item: Item) -> str:
    return kit.server.operations.get(item.environment_id, item.id).state
