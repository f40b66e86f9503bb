"""The output of the demo as plain lines. A view reads the state and does not change it."""

from contextlib import AbstractContextManager
from time import monotonic
from typing import Final

import typer

from workpool.cli.demo.demo_state import DemoState
from workpool.cli.demo.demo_workers import Worker

PLAIN_SECONDS: Final = 2.0
"""The interval of the lines of progress."""


class PlainView(AbstractContextManager["PlainView"]):
    """A view that prints lines to stdout; a context for the duration of the demo."""

    def __init__(self) -> None:
        self._drawn_at = monotonic()

    def __exit__(self, *_: object) -> None:
        """No effect."""

    def say(self, line: str) -> None:
        """Print a line of the demo."""
        typer.echo(line)

    def show(self, worker: str, line: str) -> None:
        """Print a line of a worker, with its name."""
        typer.echo(f"{worker}  {line}")

    def draw(self, state: DemoState) -> None:
        """Print a line of progress in each interval."""
        if monotonic() - self._drawn_at < PLAIN_SECONDS:
            return
        self._drawn_at = monotonic()
        parts = [f"queue {state.queued}", f"running {len(state.held)}", f"stopped {state.stopped}"]
        parts += [plain_text(worker) for worker in state.workers if worker.state == "running"]
        typer.echo(f"-- {' | '.join(parts)}")


def plain_text(worker: Worker) -> str:
    """Return the state of a worker in one line."""
    return (
        f"{worker.name}: {slots_text(worker)} slots, {outcomes_text(worker)},"
        f" polls {latency_text(worker)}, {worker.metrics.null_ratio:.0%} null,"
        f" {reclaims_text(worker)}"
    )


def slots_text(worker: Worker) -> str:
    """Return the busy slots and all slots, such as `3/4`."""
    return f"{worker.metrics.busy}/{worker.metrics.slots}"


def outcomes_text(worker: Worker) -> str:
    """Return the number of ended sessions by outcome."""
    outcomes = worker.metrics.outcomes.items()
    return ", ".join(f"{number} {outcome}" for outcome, number in outcomes) or "-"


def latency_text(worker: Worker) -> str:
    """Return the mean duration of a poll."""
    return f"{worker.metrics.poll_latency * 1000:.0f} ms"


def reclaims_text(worker: Worker) -> str:
    """Return the numbers of items that the worker gained and lost."""
    return f"{worker.metrics.gained} gained, {worker.metrics.lost} lost"
