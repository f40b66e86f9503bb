"""The demo on a terminal: log lines scroll above a table that changes in place."""

from collections.abc import Callable, Mapping
from typing import Final, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from workpool.cli.demo.demo_state import DemoState
from workpool.cli.demo.demo_workers import Worker
from workpool.cli.demo.plain_view import (
    PlainView,
    latency_text,
    outcomes_text,
    reclaims_text,
    slots_text,
)

_STYLES: Final = {"running": "green", "killed": "bold red", "starting": "yellow", "ended": "dim"}

_ROWS: Final[Mapping[str, Callable[[Worker], str]]] = {
    "slots": slots_text,
    "sessions": outcomes_text,
    "poll latency": latency_text,
    "null rate": lambda worker: f"{worker.metrics.null_ratio:.0%}",
    "reclaims": reclaims_text,
}


class LiveView(PlainView):
    """A view on which log lines scroll above a table that changes in place."""

    def __init__(self) -> None:
        self._live = Live(console=Console(highlight=False), auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last table on the terminal."""
        self._live.stop()

    def say(self, line: str) -> None:
        """Print a line of the demo in bold."""
        self._live.console.print(Text(line, style="bold"))

    def show(self, worker: str, line: str) -> None:
        """Print a line of a worker, with its name."""
        self._live.console.print(Text.assemble((f"{worker}  ", "cyan"), line))

    def draw(self, state: DemoState) -> None:
        """Redraw the table."""
        self._live.update(picture(state), refresh=True)


def picture(state: DemoState) -> Panel:
    """Return the table of the state."""
    table = Table("", *(worker.name for worker in state.workers), box=box.SIMPLE)
    table.add_row("state", *(Text(one.state, style=_STYLES[one.state]) for one in state.workers))
    for label, text in _ROWS.items():
        table.add_row(label, *(text(worker) for worker in state.workers))
    head = Text(
        f"queue {state.queued}   running {len(state.held)}   stopped {state.stopped}"
        f" of {state.count}"
    )
    urls = Text("\n".join(f"  {worker.name}  {worker.url or '-'}" for worker in state.workers))
    bar = ProgressBar(total=state.count, completed=state.stopped)
    return Panel(Group(head, bar, table, urls), title=f"control plane {state.url}")
