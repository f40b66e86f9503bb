"""The run of `workpool demo`, which ends with a check of the history.

The control plane is in this process, two workers have processes of their own, and all calls are
real HTTP. One worker is killed (SIGKILL) while it holds sessions, and the other one finishes them.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
import typer
from aiohttp import web

from workpool.cli import exits
from workpool.cli.demo.demo_state import DemoState, worker_of
from workpool.cli.demo.demo_workers import Worker, worker_settings
from workpool.cli.demo.plain_view import PlainView
from workpool.cli.signals import Signals
from workpool.plugins import available
from workpool.pool.lease_renewer import new_event_loop
from workpool.server import ControlPlane, Summary

FIRST: Final = 4
"""Sessions in the queue at the start; the others follow once both workers poll."""
FIRST_SECONDS: Final = "0.2"
SECONDS: Final = "1.5"
TICK_SECONDS: Final = 0.1
SCRAPE_EVERY_SECONDS: Final = 1.0
STALL_SECONDS: Final = 20.0
"""Seconds without an ended session that count as a failure; a killed worker's lease lasts 10 s."""
END_SECONDS: Final = 6.0
"""Seconds in which workers may drain before they are killed."""

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


def run_demo(handler: str | None, metadata: Mapping[str, str], count: int) -> int:
    """Run the demo and return the exit status."""
    chosen = handler or ("echo" if _installed("echo") else "workpool.cli.demo.sample")
    plans = _plans(count, metadata, example=handler is None)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_run_demo(chosen, plans))


def _installed(plugin: str) -> bool:
    return any(one.name == plugin for one in available())


def _plans(count: int, given: Mapping[str, str], *, example: bool) -> list[dict[str, str]]:
    """Return the metadata of each session."""
    if not example:
        return [dict(given) for _ in range(count)]
    return [
        {
            "text": f"session {number:02d}",
            "seconds": FIRST_SECONDS if number <= FIRST else SECONDS,
            **given,
        }
        for number in range(1, count + 1)
    ]


async def _run_demo(handler: str, plans: list[dict[str, str]]) -> int:
    runner = DemoRunner(handler, plans)
    with Signals() as signals:
        async with runner.plane:
            with runner.view:
                status = await runner.run(signals)
            summary = runner.plane.summary()
    if signals.last is not None:
        typer.echo(f"ended early: {summary.stopped} of {len(plans)} sessions done")
        return exits.SIGNALLED + signals.last
    if status != exits.OK:
        return status
    typer.echo(f"{promise_text(summary)}\n{NEXT}")
    kept = summary.enqueued == summary.stopped and not summary.overlapping
    return exits.OK if kept else exits.FAILED


def promise_text(summary: Summary) -> str:
    """Return a line like `40 enqueued · 40 stopped · 3 reclaimed · 0 lost · 0 overlapping`."""
    return " · ".join(f"{value} {name}" for name, value in summary._asdict().items())


NEXT: Final = """\
Try next:
  workpool demo MODULE:HANDLER --metadata KEY=VALUE   the same with your own handler
  workpool serve                                      a queue that stays
  workpool run --help                                 a worker for it"""


class DemoRunner:
    """One run of the demo.

    Attributes:
        plane: The control plane; not entered.
        view: The output; not entered.
    """

    def __init__(self, handler: str, plans: list[dict[str, str]]) -> None:
        self.plane = ControlPlane(middlewares=[self._watch])
        self.view = open_view()
        self._handler = handler
        self._plans = plans
        self._names: dict[str, str] = {}
        self._state = DemoState(len(plans), self.plane.history, self._names)
        self._workers: list[Worker] = []
        self._polled: set[str] = set()
        self._victim: Worker | None = None

    async def run(self, signals: Signals) -> int:
        """Run until the end or the first signal. All workers have ended when it returns."""
        self._workers = [self._worker(f"worker-{number}") for number in (1, 2)]
        state = self._state
        state.url, state.workers = self.plane.base_url, self._workers
        self.view.say(
            f"workpool demo: {state.count} sessions for {self._handler}, 2 workers,"
            f" control plane {state.url}"
        )
        self._enqueue(FIRST)
        async with self._running_workers(signals):
            return await self._follow(signals)

    @asynccontextmanager
    async def _running_workers(self, signals: Signals) -> AsyncIterator[None]:
        """Run the processes of the workers and read their metrics, until the end of the block."""
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:
            tasks = {group.create_task(worker.live(), name=worker.name) for worker in self._workers}
            scraping = group.create_task(self._scrape(http), name="scrape")
            yield
            for worker in self._workers:
                worker.terminate()
            ending = group.create_task(signals.second.wait(), name="second-signal")
            await self._ended(tasks, ending)
            for task in (*tasks, scraping, ending):
                task.cancel()  # kills a process that has not ended

    async def _ended(self, tasks: set["asyncio.Task[None]"], ending: "asyncio.Task[bool]") -> None:
        """Wait until all workers have ended, at most `END_SECONDS`, or until a second signal."""
        until = asyncio.get_running_loop().time() + END_SECONDS
        while tasks and not ending.done():
            left = until - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await asyncio.wait({*tasks, ending}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            tasks = {task for task in tasks if not task.done()}

    async def _follow(self, signals: Signals) -> int:
        """Show the state until all sessions have ended, or until a signal."""
        state, loop = self._state, asyncio.get_running_loop()
        acked, moved_at = 0, loop.time()
        while state.stopped < state.count:
            if signals.first.is_set():
                self.view.say("ending: the workers drain")
                return exits.OK
            for worker in self._workers:
                if worker.status is not None and worker is not self._victim:
                    self.view.say(f"{worker.name} ended by itself, status {worker.status}")
                    return worker.status or exits.FAILED
            if len(self._polled) == len(self._workers):
                self._enqueue(state.count)
            if state.held or state.acked != acked:
                acked, moved_at = state.acked, loop.time()
            elif loop.time() - moved_at > STALL_SECONDS:
                self.view.say("no worker takes these sessions: does --metadata match the handler?")
                return exits.FAILED
            self.view.draw(state)
            await asyncio.sleep(TICK_SECONDS)
        self.view.draw(state)
        return exits.OK

    def _worker(self, name: str) -> Worker:
        plane = self.plane
        settings = worker_settings(plane.base_url, plane.token, plane.environments[0], name)
        return Worker(name, self._handler, settings, self.view.show)

    def _enqueue(self, until: int) -> None:
        """Create sessions until their number is `until`."""
        for metadata in self._plans[len(self._names) : until]:
            [item] = self.plane.enqueue(metadata=metadata)
            self._names[item.id] = f"session {len(self._names) + 1:02d}"

    @web.middleware
    async def _watch(self, request: web.Request, handler: Respond) -> web.StreamResponse:
        """Follow the history after each request, and kill a worker at the right time."""
        worker = worker_of(request.headers.get("Worker-ID"))
        if self._victim is not None and worker == self._victim.name:
            raise web.HTTPServiceUnavailable  # a late request of the killed worker
        self._polled.add(worker)
        response = await handler(request)
        for line in self._state.follow():
            self.view.say(line)
        if self._victim is None and len(self._names) == len(self._plans):
            self._kill_one()
        return response

    def _kill_one(self) -> None:
        """Kill a worker once it holds several sessions and a quarter of all have ended."""
        stopped, count = self._state.stopped, len(self._plans)
        wanted = 3 if stopped < count // 2 else 1
        for worker in reversed(self._workers):
            held = self._state.held_by(worker.name)
            if stopped >= count // 4 and len(held) >= wanted and self._victim is None:
                self._victim = worker
                worker.kill()
                self.view.say(
                    f"{worker.name} is killed (kill -9 {worker.pid}) while it holds"
                    f" {', '.join(held)}"
                )

    async def _scrape(self, http: aiohttp.ClientSession) -> None:
        while True:
            for worker in self._workers:
                await worker.scrape(http)
            await asyncio.sleep(SCRAPE_EVERY_SECONDS)


def open_view() -> PlainView:
    """Return a live view if stdout is a terminal, else a plain one."""
    if not sys.stdout.isatty():
        return PlainView()
    from workpool.cli.demo.live_view import LiveView  # noqa: PLC0415 - slow to import

    return LiveView()
