"""The output of the demo: a live view on a terminal, else plain lines.

Reads the state of the demo and does not change it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Final, Protocol, Self

import typer

from workpool.cli.fleet import Worker
from workpool.cli.ledger import Ledger

PLAIN_SECONDS: Final = 2.0
"""The interval of progress lines without a terminal."""


@dataclass(frozen=True)
class Scene:
    """The state of the demo that is shown."""

    url: str
    count: int
    ledger: Ledger
    workers: Sequence[Worker]

    @property
    def running(self) -> int:
        """The number of sessions that a worker holds."""
        return len(self.ledger.held)

    @property
    def queued(self) -> int:
        """The number of sessions that no worker holds."""
        return self.count - self.ledger.stopped - self.running


class Screen(Protocol):
    """The interface of a screen; a context for the duration of the demo."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def say(self, line: str) -> None:
        """Show a line of the demo."""

    def show(self, worker: str, line: str) -> None:
        """Show a line of a worker."""

    def draw(self, scene: Scene) -> None:
        """Show the current state. Called several times a second."""


class PlainScreen:
    """A screen that prints lines to stdout."""

    def __init__(self) -> None:
        self._drawn_at = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """No effect."""

    def say(self, line: str) -> None:
        """Print a line of the demo."""
        typer.echo(line)

    def show(self, worker: str, line: str) -> None:
        """Print a line of a worker, with its name."""
        typer.echo(f"{worker}  {line}")

    def draw(self, scene: Scene) -> None:
        """Print a line of progress in each interval."""
        if monotonic() - self._drawn_at < PLAIN_SECONDS:
            return
        self._drawn_at = monotonic()
        ledger = scene.ledger
        parts = [f"queue {scene.queued}", f"running {scene.running}", f"stopped {ledger.stopped}"]
        parts += [plain_text(worker) for worker in scene.workers if worker.state == "running"]
        typer.echo(f"-- {' | '.join(parts)}")


def plain_text(worker: Worker) -> str:
    """Return the state of a worker in one line."""
    return (
        f"{worker.name}: {slots_text(worker)} slots, {outcomes_text(worker)},"
        f" polls {latency_text(worker)}, {worker.figures.null_ratio:.0%} null,"
        f" {reclaims_text(worker)}"
    )


def slots_text(worker: Worker) -> str:
    """Return the busy slots and all slots, such as `3/4`."""
    return f"{worker.figures.busy}/{worker.figures.slots}"


def outcomes_text(worker: Worker) -> str:
    """Return the number of ended sessions by outcome."""
    outcomes = worker.figures.outcomes.items()
    return ", ".join(f"{number} {outcome}" for outcome, number in outcomes) or "-"


def latency_text(worker: Worker) -> str:
    """Return the mean duration of a poll."""
    return f"{worker.figures.poll_latency * 1000:.0f} ms"


def reclaims_text(worker: Worker) -> str:
    """Return the numbers of items that the worker gained and lost."""
    return f"{worker.figures.gained} gained, {worker.figures.lost} lost"


def open_screen() -> Screen:
    """Return a live screen if stdout is a terminal, else a plain one."""
    if not sys.stdout.isatty():
        return PlainScreen()
    from workpool.cli.live import LiveScreen  # noqa: PLC0415 - slow to import

    return LiveScreen()
