"""Writes the picture of the demo that README shows: `python -m tests.write_demo_picture`.

The picture has the last table of a demo of 40 sessions, below the sentences about sessions that
changed hands.
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from workpool.cli.demo.demo_runner import DemoRunner
from workpool.cli.demo.demo_sessions import EXAMPLE, make_sessions_for_handler
from workpool.cli.demo.demo_view import DemoView, make_state_table
from workpool.cli.signals import SignalEvents

if TYPE_CHECKING:
    from workpool.cli.demo.demo_state import DemoState

PICTURE: Final = Path(__file__).parents[1] / "workpool/docs/demo.svg"
COLUMNS: Final = 112


class DemoViewWithoutLiveOutput(DemoView):
    """A demo view that prints the demo's own messages, but no log lines and no live tables."""

    def print_worker_line(self, worker: str, line: str) -> None:
        """Print nothing, because the picture contains no log lines of workers."""

    def draw_state(self, state: DemoState) -> None:
        """Ignore the tables of the running demo; `record_demo` prints the final table."""


async def record_demo() -> str:
    """Run the demo and return the picture as SVG text."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), highlight=False, color_system="truecolor"
    )
    runner = DemoRunner(
        EXAMPLE, make_sessions_for_handler(EXAMPLE, {}, 40), DemoViewWithoutLiveOutput(console)
    )
    with SignalEvents() as signals:
        async with runner.plane:
            await runner.run(signals)
    console.print(make_state_table(runner.state))
    numbers = runner.plane.summary()._asdict() | {"failed": runner.state.failed.total()}
    console.print(" · ".join(f"{value} {name}" for name, value in numbers.items()))
    return console.export_svg(title="workpool demo", unique_id="demo")


if __name__ == "__main__":
    PICTURE.write_text(asyncio.run(record_demo()) + "\n")
