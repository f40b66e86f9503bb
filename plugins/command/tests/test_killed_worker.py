"""Tests of commands, detached or not, whose `workpool run` process is killed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any

import pytest

from plugins.command.tests.conftest import WAIT_SECONDS
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
    """Run a `workpool run command` process with these settings, and kill it at the end."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    config = tmp_path / "workpool.toml"
    config.write_text("\n".join(["[workpool]", "[workpool.plugin.command]", *lines]))
    variables = {
        "WORKPOOL_BASE_URL": kit.server.base_url,
        "WORKPOOL_ENVIRONMENT_ID": kit.server.environments[0],
        "WORKPOOL_TOKEN": kit.server.token,
        "WORKPOOL_METRICS_LISTEN": "off",
        "WORKPOOL_CONFIG": str(config),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workpool", "run", "command"),
        env=os.environ | variables,
        stderr=DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_commands_of_killed_worker_are_killed(kit: Kit, procfs: Any, tmp_path: Path) -> None:
    script = "sh -c 'echo $$ >>$0; sleep 60' $0 & echo $$ >>$0; wait"
    command = ["sh", "-c", script, str(tmp_path / "pids")]
    async with running_worker(kit, tmp_path, command=command) as process:
        kit.enqueue(2)
        pids = await procfs.wait_for_file_lines(tmp_path / "pids", 4)
        process.kill()
        await process.wait()
        await procfs.wait_for_process_end(pids)


WAITING_SCRIPT = """
    cat >item; env >env; echo hello; echo started >$0/started
    read go <$0/fifo
"""


async def test_detached_command_continues_after_its_worker_is_killed(
    kit: Kit, procfs: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    command = ["sh", "-c", WAITING_SCRIPT, str(tmp_path)]
    root = tmp_path / "root"
    async with running_worker(
        kit, tmp_path, command=command, detach=True, root=str(root)
    ) as process:
        [item] = kit.enqueue()
        await procfs.wait_for_file_lines(tmp_path / "started")
        process.kill()
        await process.wait()
    assert read_item_state(kit, item) == "active"
    await asyncio.to_thread((tmp_path / "fifo").write_text, "go\n")
    await procfs.wait_until(lambda: read_item_state(kit, item) == "stopped")

    cwd = root / item.session_id
    assert json.loads((cwd / "item").read_text())["id"] == item.id
    assert kit.server.token not in (cwd / "env").read_text()
    assert "WORKPOOL_REDELIVERED=0\n" in (cwd / "env").read_text()
    assert "hello\n" in (cwd / "output.log").read_text()


async def test_detached_command_of_running_worker_is_reaped(
    kit: Kit, procfs: Any, tmp_path: Path
) -> None:
    children, descriptors = (
        procfs.list_child_processes(),
        procfs.list_open_descriptors(),
    )
    [item] = kit.enqueue()
    async with kit.pool(Command(command=["true"], detach=True, root=tmp_path)):
        end = await kit.wait_for(SessionFinished, timeout=WAIT_SECONDS)
        await procfs.wait_until(lambda: read_item_state(kit, item) == "stopped")
        # Wait until the `workpool hold` process is reaped. Only the guard process remains.
        await procfs.wait_until(lambda: len(procfs.list_child_processes() - children) == 1)

    assert end.outcome == "detached"
    assert procfs.list_child_processes() == children
    assert procfs.list_open_descriptors() == descriptors


async def test_pool_releases_detached_session_if_token_of_hold_command_is_refused(
    kit: Kit, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(kit.server.token)
    command = Command(command=["true"], detach=True, root=tmp_path)
    async with kit.pool(command, token=None, token_file=token):
        # The pool keeps using the first token, because the control plane accepts it. Only `workpool
        # hold` reads the revoked token.
        token.write_text("revoked")
        [item] = kit.enqueue()
        end = await kit.wait_for(SessionFinished, timeout=WAIT_SECONDS)

    assert end.outcome == "released"
    assert str(end.error).startswith("workpool hold: exit status 3; see ")
    assert "401" in (tmp_path / item.session_id / "output.log").read_text()


def read_item_state(kit: Kit, item: Item) -> str:
    return kit.server.operations.get_item(item.environment_id, item.id).state
