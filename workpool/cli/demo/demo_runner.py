"""The run of `workpool demo`, which ends with a check of the history.

The control plane is in this process, two workers have processes of their own, and all calls are
real HTTP. One worker is killed (SIGKILL) while it holds sessions, and the other one finishes them.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import typer
from aiohttp import web

from workpool.cli import exits
from workpool.cli.demo.demo_sessions import EXAMPLE, FIRST, DemoSession, sessions_for
from workpool.cli.demo.demo_state import DemoState, worker_of
from workpool.cli.demo.demo_view import View
from workpool.cli.demo.demo_workers import Worker, worker_settings
from workpool.cli.flags import import_from_here
from workpool.cli.signals import Signals
from workpool.pool.lease_renewer import new_event_loop
from workpool.server import ControlPlane
from workpool.server.timestamps import system_clock

TICK_SECONDS: Final = 0.1
STALL_SECONDS: Final = 20.0
"""Seconds without an ended session that count as a failure; a killed worker's lease lasts 10 s."""
FAILED_SESSIONS: Final = 10
"""The demo ends early once so many sessions failed and none was completed.

Workers hold back a handler that fails at once for longer and longer, so the demo would stand still.
"""
END_SECONDS: Final = 6.0
"""Seconds in which workers may drain before they are killed."""
NEXT: Final = """\
Try next:
  workpool demo MODULE:HANDLER --metadata KEY=VALUE   the same with your own handler
  workpool serve                                      a queue that stays
  workpool run --help                                 a worker for it"""

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


def run_demo(handler: str | None, metadata: Mapping[str, str], count: int) -> int:
    """Run the demo and return the exit status: `FAILED` if a session failed, too.

    Raises:
        PluginError: The handler cannot be imported, or takes no item with this metadata.
    """
    import_from_here()
    chosen = handler or EXAMPLE
    sessions = sessions_for(chosen, metadata, count)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_run_demo(chosen, sessions))


async def _run_demo(handler: str, sessions: list[DemoSession]) -> int:
    runner = DemoRunner(handler, sessions)
    with Signals() as signals:
        async with runner.plane:
            with runner.view:
                status = await runner.run(signals)
    numbers = runner.plane.summary()._asdict() | {"failed": runner.state.failed.total()}
    if signals.last is not None:
        typer.echo(f"ended early: {numbers['stopped']} of {len(sessions)} sessions done")
        return exits.SIGNALLED + signals.last
    if status != exits.OK:
        return status
    typer.echo(" · ".join(f"{value} {name}" for name, value in numbers.items()))
    typer.echo(NEXT)
    wrong = any(numbers[name] for name in ("lost", "overlapping", "failed"))
    return exits.FAILED if wrong else exits.OK


class DemoRunner:
    """One run of the demo.

    Attributes:
        plane: The control plane; not entered.
        view: The output; not entered.
        state: The sessions and workers.
    """

    def __init__(self, handler: str, sessions: list[DemoSession], view: View | None = None) -> None:
        clock = system_clock()
        self.plane = ControlPlane(middlewares=[self._follow_history], now=clock)
        self.view = view or View()
        self._handler = handler
        self._sessions = sessions
        self._names: dict[str, str] = {}
        self.state = DemoState(len(sessions), self.plane, self._names, clock)
        self._workers: list[Worker] = []
        self._polled: set[str] = set()
        self._victim: Worker | None = None

    async def run(self, signals: Signals) -> int:
        """Run until the end or the first signal. All workers have ended when it returns."""
        self._workers = [self._new_worker(f"worker-{number}") for number in (1, 2)]
        self.state.workers = self._workers
        self.view.say(
            f"workpool demo: {self.state.count} sessions for {self._handler}, 2 workers,"
            f" control plane {self.state.url}"
        )
        self._create_sessions(FIRST)
        async with self._running_workers(signals):
            return await self._show_until_end(signals)

    @asynccontextmanager
    async def _running_workers(self, signals: Signals) -> AsyncIterator[None]:
        """Run the processes of the workers until the end of the block, then let them drain."""
        async with asyncio.TaskGroup() as group:
            tasks = {group.create_task(worker.live(), name=worker.name) for worker in self._workers}
            yield
            for worker in self._workers:
                worker.terminate()
            all_ended = group.create_task(_wait_for_all(tasks), name="drain")
            hurry = group.create_task(signals.second.wait(), name="second-signal")
            await asyncio.wait(
                {all_ended, hurry}, timeout=END_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            for task in (*tasks, all_ended, hurry):
                task.cancel()  # the cancellation kills a worker that has not ended

    async def _show_until_end(self, signals: Signals) -> int:
        """Show the state until all sessions have ended, or until a signal."""
        state, loop = self.state, asyncio.get_running_loop()
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
                self._create_sessions(state.count)
            if state.held or state.acked != acked:
                acked, moved_at = state.acked, loop.time()
            problem = self._find_problem(loop.time() - moved_at)
            if problem is not None:
                self.view.say(problem)
                return exits.FAILED
            self.view.draw(state)
            await asyncio.sleep(TICK_SECONDS)
        self.view.draw(state)
        return exits.OK

    def _find_problem(self, idle_seconds: float) -> str | None:
        """Return the reason why the rest of the demo would show nothing; None without one."""
        failed = self.state.failed.total()
        if failed >= FAILED_SESSIONS and not self.state.completed.total():
            return f"{failed} sessions failed, and none was completed: mend the handler"
        if idle_seconds <= STALL_SECONDS:
            return None
        if failed:
            return "the workers hold back, as the last sessions of a handler failed at once"
        return "no worker takes these sessions: does --metadata match the handler?"

    def _new_worker(self, name: str) -> Worker:
        plane = self.plane
        settings = worker_settings(plane.base_url, plane.token, plane.environments[0], name)
        return Worker(name, self._handler, settings, self.view.show)

    def _create_sessions(self, until: int) -> None:
        """Create sessions until their number is `until`."""
        for session in self._sessions[len(self._names) : until]:
            [item] = self.plane.enqueue(metadata=session.metadata, work_type=session.type)
            self._names[item.id] = f"session {len(self._names) + 1:02d}"

    @web.middleware
    async def _follow_history(self, request: web.Request, handler: Respond) -> web.StreamResponse:
        """Follow the history after each request, and kill a worker at the right time."""
        worker = worker_of(request.headers.get("Worker-ID"))
        if self._victim is not None and worker == self._victim.name:
            raise web.HTTPServiceUnavailable  # a late request of the killed worker
        self._polled.add(worker)
        response = await handler(request)
        for line in self.state.follow():
            self.view.say(line)
        if self._victim is None and len(self._names) == len(self._sessions):
            self._kill_one()
        return response

    def _kill_one(self) -> None:
        """Kill a worker once it holds several sessions and a quarter of all have ended."""
        stopped, count = self.state.stopped, len(self._sessions)
        wanted = 3 if stopped < count // 2 else 1
        for worker in reversed(self._workers):
            held = self.state.held_by(worker.name)
            if stopped >= count // 4 and len(held) >= wanted and self._victim is None:
                self._victim = worker
                worker.kill()
                self.view.say(
                    f"{worker.name} is killed (kill -9 {worker.pid}) while it holds"
                    f" {', '.join(held)}"
                )


async def _wait_for_all(tasks: "set[asyncio.Task[None]]") -> None:
    await asyncio.wait(tasks)
