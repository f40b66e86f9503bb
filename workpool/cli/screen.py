"""What the demo shows: a live view on a terminal, plain lines elsewhere.

Reads the scene and changes nothing in it.
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
"""How often a screen without a terminal says how far things are."""


@dataclass(frozen=True)
class Scene:
    """What there is to see."""

    url: str
    count: int
    ledger: Ledger
    workers: Sequence[Worker]

    @property
    def running(self) -> int:
        """Sessions that a worker holds."""
        return len(self.ledger.held)

    @property
    def queued(self) -> int:
        """Sessions that nobody holds."""
        return self.count - self.ledger.stopped - self.running


class Screen(Protocol):
    """A context while the scene is on."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def say(self, line: str) -> None:
        """The demo's own word."""

    def show(self, worker: str, line: str) -> None:
        """A line that a worker wrote."""

    def draw(self, scene: Scene) -> None:
        """Called several times a second."""


class PlainScreen:
    """Lines on stdout."""

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
        """Nothing to put back."""

    def say(self, line: str) -> None:
        """Print it."""
        typer.echo(line)

    def show(self, worker: str, line: str) -> None:
        """Print it behind the worker's name."""
        typer.echo(f"{worker}  {line}")

    def draw(self, scene: Scene) -> None:
        """Print how far things are, now and then."""
        if monotonic() - self._drawn_at < PLAIN_SECONDS:
            return
        self._drawn_at = monotonic()
        ledger = scene.ledger
        parts = [f"queue {scene.queued}", f"running {scene.running}", f"stopped {ledger.stopped}"]
        parts += [plain_text(worker) for worker in scene.workers if worker.state == "running"]
        typer.echo(f"-- {' | '.join(parts)}")


def plain_text(worker: Worker) -> str:
    """A worker in one line."""
    return (
        f"{worker.name}: {slots_text(worker)} slots, {outcomes_text(worker)},"
        f" polls {latency_text(worker)}, {worker.figures.null_ratio:.0%} null,"
        f" {reclaims_text(worker)}"
    )


def slots_text(worker: Worker) -> str:
    """`3/4`: busy of all."""
    return f"{worker.figures.busy}/{worker.figures.slots}"


def outcomes_text(worker: Worker) -> str:
    """Sessions that it ended, by outcome."""
    outcomes = worker.figures.outcomes.items()
    return ", ".join(f"{number} {outcome}" for outcome, number in outcomes) or "-"


def latency_text(worker: Worker) -> str:
    """The mean time of a poll."""
    return f"{worker.figures.poll_latency * 1000:.0f} ms"


def reclaims_text(worker: Worker) -> str:
    """Items that changed hands, as the worker saw it."""
    return f"{worker.figures.gained} gained, {worker.figures.lost} lost"


def open_screen() -> Screen:
    """The screen that fits where stdout goes."""
    if not sys.stdout.isatty():
        return PlainScreen()
    from workpool.cli.live import LiveScreen  # noqa: PLC0415 - slow to import

    return LiveScreen()
