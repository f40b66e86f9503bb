"""The output of the demo: log lines above a live table; without a terminal, only lines."""

from contextlib import AbstractContextManager
from time import monotonic
from typing import Final, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from workpool.cli.demo.demo_state import DemoState
from workpool.cli.demo.demo_workers import SLOTS, DemoWorker

LINE_SECONDS: Final = 2.0
"""The interval of the lines of progress if the output is no terminal."""
_STYLES: Final = {"running": "green", "killed": "bold red", "starting": "yellow", "ended": "dim"}


class DemoView(AbstractContextManager["DemoView"]):
    """Prints the state and the log lines of one demo run. Does not change the `DemoState`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._drawn_at = monotonic()

    def __enter__(self) -> Self:
        """Start the live table if the output is a terminal."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop updating the table, which stays on the terminal."""
        self._live.stop()

    def print_demo_line(self, line: str) -> None:
        """Print a message of the demo itself, in bold."""
        self._console.print(Text(line, style="bold"), soft_wrap=True)

    def print_worker_line(self, worker: str, line: str) -> None:
        """Print a log line of a worker after the name of the worker."""
        self._console.print(Text.assemble((f"{worker}  ", "cyan"), line), soft_wrap=True)

    def draw_state(self, state: DemoState) -> None:
        """Redraw the table; without a terminal, print a line at intervals and at the end."""
        if self._console.is_terminal:
            self._live.update(make_state_table(state), refresh=True)
        elif (
            monotonic() - self._drawn_at >= LINE_SECONDS or state.ended_session_count == state.count
        ):
            self._drawn_at = monotonic()
            self._console.print(Text(format_progress_line(state)), soft_wrap=True)


def make_state_table(state: DemoState) -> Panel:
    """Return the table that shows the queue and the workers."""
    workers = state.workers
    table = Table("", *(worker.name for worker in workers), box=box.SIMPLE)
    table.add_row(
        "state", *(Text(format_worker_state(state, one), _STYLES[one.state]) for one in workers)
    )
    table.add_row("slots", *(format_busy_slots(state, worker) for worker in workers))
    table.add_row("sessions", *(state.format_results(worker.name) for worker in workers))
    table.add_row("reclaimed", *(str(state.reclaimed[worker.name]) for worker in workers))
    table.add_row("metrics", *(worker.url or "-" for worker in workers))
    bar = ProgressBar(total=state.count, completed=state.ended_session_count)
    return Panel(
        Group(Text(format_queue_counts(state)), bar, table),
        title=f"control plane {state.control_plane_url}",
    )


def format_progress_line(state: DemoState) -> str:
    """Return the state of the queue and the workers as one line."""
    workers = (
        f"{one.name} {format_worker_state(state, one)}, {format_busy_slots(state, one)} slots,"
        f" {state.format_results(one.name)}"
        for one in state.workers
    )
    return f"-- {' | '.join([format_queue_counts(state), *workers])}"


def format_queue_counts(state: DemoState) -> str:
    """Return the numbers of queued, running and stopped sessions as text."""
    ended = f"{state.ended_session_count} of {state.count}"
    return f"queue {state.queued_session_count}   running {len(state.held)}   stopped {ended}"


def format_worker_state(state: DemoState, worker: DemoWorker) -> str:
    """Return the state of a worker, and for a killed worker the time until its leases lapse."""
    seconds = state.seconds_until_lease_lapse(worker.name) if worker.state == "killed" else None
    return worker.state if seconds is None else f"killed, leases lapse in {seconds:.0f} s"


def format_busy_slots(state: DemoState, worker: DemoWorker) -> str:
    """Return the numbers of busy slots and of all slots of a worker, such as `3/4`."""
    return "-" if worker.state == "starting" else f"{state.held_item_count(worker.name)}/{SLOTS}"
