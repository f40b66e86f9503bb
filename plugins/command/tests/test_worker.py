"""`workpool run` with the plugin, in a process of its own, which is killed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from workpool.testing import Kit

pytestmark = pytest.mark.acceptance


@asynccontextmanager
async def worker(
    kit: Kit, tmp_path: Path, **table: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`workpool run command`, with this table."""
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


async def test_commands_do_not_outlive_a_worker_that_is_killed(
    kit: Kit, machine: Any, tmp_path: Path
) -> None:
    script = "sh -c 'echo $$ >>$0; sleep 60' $0 & echo $$ >>$0; wait"
    command = ["sh", "-c", script, str(tmp_path / "pids")]
    async with worker(kit, tmp_path, command=command) as process:
        kit.enqueue(2)
        pids = await machine.written(tmp_path / "pids", 4)
        process.kill()
        await process.wait()
        await machine.gone(pids)
