"""Runs a control plane and its workers in a situation that must make alerts fire."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.reserved_port import reserve_port
from workpool.server import ControlPlane
from workpool.testing import Faults

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Iterator

    from tests.alerts.alert_causes import AlertCause
    from workpool.server import Item

ROOT = Path(__file__).parents[2]
WORKERS_MAX = 4


class AlertCauseSetup:
    """A control plane and workers in one situation that makes alerts fire.

    The class is an async context manager.

    Attributes:
        environment: The id of the environment, and the label of its alerts.
        ports: The ports at which Prometheus scrapes the workers.
    """

    def __init__(self, environment: str, cause: AlertCause, logs: Path) -> None:
        self.environment = environment
        self.faults = Faults()
        self.plane = ControlPlane(environments=[environment], middlewares=[self.faults.middleware])
        self._reserved = ExitStack()
        self.ports = [self._reserved.enter_context(reserve_port()) for _ in range(WORKERS_MAX)]
        self._free_ports: Iterator[int] = iter(self.ports)
        self._cause = cause
        self._logs = logs
        self._workers: list[Process] = []

    async def __aenter__(self) -> Self:
        await self.plane.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.kill_workers()
        for worker in self._workers:
            await worker.wait()
        await self.plane.__aexit__(None, None, None)
        self._reserved.close()

    def kill_workers(self) -> None:
        """Kill all workers that `start_worker` has started."""
        for worker in self._workers:
            if worker.returncode is None:
                worker.kill()

    async def start_worker(self) -> Process:
        """Start `workpool run`, and wait for its first poll."""
        polls = len(self.faults.of("poll"))
        port = next(self._free_ports)
        variables = {
            "BASE_URL": self.plane.base_url,
            "TOKEN": self.plane.token,
            "ENVIRONMENT_ID": self.environment,
            "METRICS_LISTEN": f"127.0.0.1:{port}",
            "WORKER_ID": f"{self.environment}-{port}",
            **self._cause.settings,
        }
        with (self._logs / f"{self.environment}-{port}.log").open("wb") as log:
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "workpool", "run"),
                *("tests.alerts.worker_handlers:run_requested_behaviour", *self._cause.plugins),
                cwd=ROOT,
                env=os.environ | {f"WORKPOOL_{name}": value for name, value in variables.items()},
                stdout=log,
                stderr=log,
            )
        self._workers.append(worker)
        await self.faults.wait_for("poll", count=polls + 1, answered=True, timeout=180)
        return worker

    def enqueue_items(
        self, *, count: int = 1, do: str = "sleep", kind: str = "wanted", seconds: str = "1"
    ) -> tuple[Item, ...]:
        """Enqueue items whose metadata `do` selects the behaviour of the handler."""
        metadata = {"do": do, "kind": kind, "seconds": seconds}
        return self.plane.enqueue(count, metadata)

    async def wait_for_claims(self, count: int) -> None:
        """Wait until workers have acknowledged `count` items since the start."""
        await self.faults.wait_for("ack", count=count, timeout=120, answered=True)
