"""The trial run of the sandbox ends in bounded time, whatever becomes of its process."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest
import uvloop

from workpool_toolset import isolation
from workpool_toolset.isolation import Bubblewrap, Limits, problem

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.filterwarnings("ignore:unclosed resource <UVProcessTransport:ResourceWarning")
def test_sandbox_trial_reaped_by_other_code_reports_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "PROBE_SECONDS", 0.5)
    os.mkfifo(tmp_path / "pid")
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
    program.chmod(0o755)
    sandbox = Bubblewrap(Limits(), as_root=False, program=str(program))

    async def lose_the_trial() -> str | None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            trial = tasks.create_task(problem(sandbox, tmp_path))
            kill_and_reap(int(await asyncio.to_thread((tmp_path / "pid").read_text)))
        return trial.result()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(lose_the_trial()) == "bwrap did not answer"


def kill_and_reap(pid: int) -> None:
    """Block the loop meanwhile: it would take the exit status itself."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
