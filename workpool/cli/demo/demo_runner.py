"""Runs `workpool demo`: the control plane, the workers, the view, and a final check.

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
from workpool.cli.demo.demo_sessions import EXAMPLE, FIRST, DemoSession, make_sessions_for_handler
from workpool.cli.demo.demo_state import DemoState, parse_worker_name
from workpool.cli.demo.demo_view import DemoView
from workpool.cli.demo.demo_workers import DemoWorker, worker_settings
from workpool.cli.flags import add_current_directory_to_path
from workpool.cli.signals import SignalEvents
from workpool.pool.lease_renewer import new_event_loop
from workpool.server import ControlPlane
from workpool.server.timestamps import make_system_clock

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
    """Run the demo and return its exit status, which is `FAILED` if any session failed.

    Raises:
        PluginError: The handler cannot be imported, or takes no item with this metadata.
    """
    add_current_directory_to_path()
    chosen = handler or EXAMPLE
    sessions = make_sessions_for_handler(chosen, metadata, count)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_run_demo_sessions(chosen, sessions))


async def _run_demo_sessions(handler: str, sessions: list[DemoSession]) -> int:
    runner = DemoRunner(handler, sessions)
    with SignalEvents() as signals:
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
    """Runs the demo once: a control plane, two workers, and the view of their sessions.

    Attributes:
        plane: The control plane; not entered.
        view: The output; not entered.
        state: The sessions and workers.
    """

    def __init__(
        self, handler: str, sessions: list[DemoSession], view: DemoView | None = None
    ) -> None:
        clock = make_system_clock()
        self.plane = ControlPlane(middlewares=[self._state_update_middleware], now=clock)
        self.view = view or DemoView()
        self._handler = handler
        self._sessions = sessions
        self._names: dict[str, str] = {}
        self.state = DemoState(len(sessions), self.plane, self._names, clock)
        self._workers: list[DemoWorker] = []
        self._polled: set[str] = set()
        self._victim: DemoWorker | None = None

    async def run(self, signals: SignalEvents) -> int:
        """Run the demo and return its exit status; end it early at the first signal.

        When this method returns, all worker processes have ended.
        """
        self._workers = [self._new_worker(f"worker-{number}") for number in (1, 2)]
        self.state.workers = self._workers
        self.view.print_demo_line(
            f"workpool demo: {self.state.count} sessions for {self._handler}, 2 workers,"
            f" control plane {self.state.control_plane_url}"
        )
        self._create_sessions(FIRST)
        async with self._worker_processes(signals):
            return await self._show_progress(signals)

    @asynccontextmanager
    async def _worker_processes(self, signals: SignalEvents) -> AsyncIterator[None]:
        """Run the worker processes during the block, and drain the workers after the block.

        Workers that have not ended after `END_SECONDS` or at the second signal are killed.
        """
        async with asyncio.TaskGroup() as group:
            tasks = {
                group.create_task(worker.run_worker_process(), name=worker.name)
                for worker in self._workers
            }
            yield
            for worker in self._workers:
                worker.terminate()
            all_ended = group.create_task(_wait_for_tasks(tasks), name="drain")
            hurry = group.create_task(signals.second.wait(), name="second-signal")
            await asyncio.wait(
                {all_ended, hurry}, timeout=END_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            for task in (*tasks, all_ended, hurry):
                task.cancel()  # Cancelling `run_worker_process` kills its worker process.

    async def _show_progress(self, signals: SignalEvents) -> int:
        """Show the state until every session has ended, a signal arrives or the demo stalls."""
        state, loop = self.state, asyncio.get_running_loop()
        acked, moved_at = 0, loop.time()
        while state.ended_session_count < state.count:
            if signals.first.is_set():
                self.view.print_demo_line("ending: the workers drain")
                return exits.OK
            for worker in self._workers:
                if worker.status is not None and worker is not self._victim:
                    self.view.print_demo_line(
                        f"{worker.name} ended by itself, status {worker.status}"
                    )
                    return worker.status or exits.FAILED
            if len(self._polled) == len(self._workers):
                self._create_sessions(state.count)
            if state.held or state.acked != acked:
                acked, moved_at = state.acked, loop.time()
            problem = self._find_stall_reason(loop.time() - moved_at)
            if problem is not None:
                self.view.print_demo_line(problem)
                return exits.FAILED
            self.view.draw_state(state)
            await asyncio.sleep(TICK_SECONDS)
        self.view.draw_state(state)
        return exits.OK

    def _find_stall_reason(self, idle_seconds: float) -> str | None:
        """Return the reason why the demo cannot make progress; None if it can."""
        failed = self.state.failed.total()
        if failed >= FAILED_SESSIONS and not self.state.completed.total():
            return f"{failed} sessions failed, and none was completed: mend the handler"
        if idle_seconds <= STALL_SECONDS:
            return None
        if failed:
            return "the workers hold back, as the last sessions of a handler failed at once"
        return "no worker takes these sessions: does --metadata match the handler?"

    def _new_worker(self, name: str) -> DemoWorker:
        plane = self.plane
        settings = worker_settings(plane.base_url, plane.token, plane.environments[0], name)
        return DemoWorker(name, self._handler, settings, self.view.print_worker_line)

    def _create_sessions(self, total: int) -> None:
        """Create sessions until the queue has received `total` sessions."""
        for session in self._sessions[len(self._names) : total]:
            [item] = self.plane.enqueue(metadata=session.metadata, work_type=session.type)
            self._names[item.id] = f"session {len(self._names) + 1:02d}"

    @web.middleware
    async def _state_update_middleware(
        self, request: web.Request, handler: Respond
    ) -> web.StreamResponse:
        """After each request, show new history records; kill a worker if enough sessions ended."""
        worker = parse_worker_name(request.headers.get("Worker-ID"))
        if self._victim is not None and worker == self._victim.name:
            # The worker sent this request before it was killed. Refuse it, so that no item is
            # delivered to a dead worker.
            raise web.HTTPServiceUnavailable
        self._polled.add(worker)
        response = await handler(request)
        for line in self.state.apply_new_history_records():
            self.view.print_demo_line(line)
        if self._victim is None and len(self._names) == len(self._sessions):
            self._kill_worker_when_due()
        return response

    def _kill_worker_when_due(self) -> None:
        """Once a quarter of all sessions have ended, kill a worker that holds enough items."""
        stopped, count = self.state.ended_session_count, len(self._sessions)
        wanted = 3 if stopped < count // 2 else 1
        for worker in reversed(self._workers):
            held = self.state.list_held_item_names(worker.name)
            if stopped >= count // 4 and len(held) >= wanted and self._victim is None:
                self._victim = worker
                worker.kill()
                self.view.print_demo_line(
                    f"{worker.name} is killed (kill -9 {worker.pid}) while it holds"
                    f" {', '.join(held)}"
                )


async def _wait_for_tasks(tasks: "set[asyncio.Task[None]]") -> None:
    await asyncio.wait(tasks)
