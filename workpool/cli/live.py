"""The demo on a terminal: log lines that scroll above a table that changes in place."""

from types import TracebackType
from typing import Final, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from workpool.cli.screen import Scene, latency_text, reclaims_text, slots_text

_STYLES: Final = {"running": "green", "killed": "bold red", "starting": "yellow", "ended": "dim"}


class LiveScreen:
    """Log lines that scroll above a table that changes in place."""

    def __init__(self) -> None:
        self._live = Live(console=Console(highlight=False), auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """Print it, so that it stands out."""
        self._live.console.print(Text(line, style="bold"))

    def show(self, worker: str, line: str) -> None:
        """Print it behind the worker's name."""
        self._live.console.print(Text.assemble((f"{worker}  ", "cyan"), line))

    def draw(self, scene: Scene) -> None:
        """Redraw the table."""
        self._live.update(picture(scene), refresh=True)


def picture(scene: Scene) -> Panel:
    """The scene as Rich draws it."""
    table = Table(box=box.SIMPLE, expand=True)
    for column in ("worker", "state", "slots", "sessions", "poll", "null rate", "reclaims"):
        table.add_column(column, no_wrap=True)
    table.add_column("metrics", overflow="fold")
    for worker in scene.workers:
        outcomes = worker.figures.outcomes.items()
        table.add_row(
            worker.name,
            Text(worker.state, style=_STYLES[worker.state]),
            slots_text(worker),
            ", ".join(f"{number} {outcome}" for outcome, number in outcomes) or "-",
            latency_text(worker),
            f"{worker.figures.null_ratio:.0%}",
            reclaims_text(worker),
            worker.url or "-",
        )
    head = Text(
        f"queue {scene.queued}   running {scene.running}   stopped {scene.ledger.stopped}"
        f" of {scene.count}"
    )
    bar = ProgressBar(total=scene.count, completed=scene.ledger.stopped)
    return Panel(Group(head, bar, table), title=f"control plane {scene.url}")
