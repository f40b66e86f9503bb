"""Tables on a terminal, by Rich. Imported when there is one to print.

No cell is cut, as an id must be there to be copied: a column that does not fit is left out. Only
the last column is text, and is folded into the space that is left.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

TEXT_WIDTH: Final = 16
"""The least width of the last column."""
_BORDER: Final = 3
"""The characters that Rich adds to a column: a space on either side and a divider."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns; nothing in them is read as markup.

    The first column is always printed whole; the terminal wraps it if it is too narrow.
    """
    console = Console()
    widths = [max(map(cell_len, cells)) + _BORDER for cells in zip(columns, *rows, strict=True)]
    widths[-1] = min(widths[-1], TEXT_WIDTH + _BORDER)
    shown = _fitting(widths, console.width - 1)
    table = Table(box=box.SIMPLE_HEAD)
    for each in shown:
        text = each == len(columns) - 1
        table.add_column(columns[each], no_wrap=not text, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[each]) for each in shown))
    console.width = max(console.width, widths[0] + 1)
    console.print(table)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print a value a line, after its name; the terminal wraps a long one, which keeps it whole."""
    console = Console(highlight=False)
    width = max(map(cell_len, pairs))
    for name, value in pairs.items():
        console.print(Text(f"{name:<{width}}  {value}"), soft_wrap=True)


def _fitting(widths: Sequence[int], room: int) -> list[int]:
    """The numbers of the columns that fit, the first one in any case."""
    shown = [0]
    room -= widths[0]
    for number, width in enumerate(widths[1:], 1):
        if width <= room:
            shown.append(number)
            room -= width
    return shown
