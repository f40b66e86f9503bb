"""Prints tables on a terminal with Rich. Imported only when a table is printed.

No cell is cut, so that each id can be copied. A column that does not fit is left out. Only the last
column has text, which is wrapped into the remaining space.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

TEXT_WIDTH: Final = 16
"""The minimal width of the last column."""
_BORDER: Final = 3
"""The characters that Rich adds to a column: a space on each side and a divider."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table, without interpreting markup in them.

    The first column is always complete; a narrow terminal wraps it.
    """
    console = Console()
    widths = [max(map(cell_len, cells)) + _BORDER for cells in zip(columns, *rows, strict=True)]
    widths[-1] = min(widths[-1], TEXT_WIDTH + _BORDER)
    shown = _choose_fitting_columns(widths, console.width - 1)
    table = Table(box=box.SIMPLE_HEAD)
    for each in shown:
        text = each == len(columns) - 1
        table.add_column(columns[each], no_wrap=not text, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[each]) for each in shown))
    console.width = max(console.width, widths[0] + 1)
    console.print(table)


def print_names_and_values(pairs: Mapping[str, str]) -> None:
    """Print each name and its value on one line, which the terminal may wrap."""
    console = Console(highlight=False)
    width = max(map(cell_len, pairs))
    for name, value in pairs.items():
        console.print(Text(f"{name:<{width}}  {value}"), soft_wrap=True)


def _choose_fitting_columns(widths: Sequence[int], room: int) -> list[int]:
    """Return the indices of the columns that fit into `room` characters, at least the first one."""
    shown = [0]
    room -= widths[0]
    for number, width in enumerate(widths[1:], 1):
        if width <= room:
            shown.append(number)
            room -= width
    return shown
