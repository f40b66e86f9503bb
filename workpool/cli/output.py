"""Results on stdout: one JSON value, a table on a terminal, or plain lines for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import orjson
import typer

from workpool.logs import escape_text
from workpool.wire.items import QueueStats, WorkItem


def print_json(value: object) -> None:
    """Print a value as JSON, with times in UTC."""
    option = orjson.OPT_UTC_Z | orjson.OPT_INDENT_2
    text = orjson.dumps(value, default=dict, option=option).decode()
    # Escape control characters, because a string from the control plane could change the terminal.
    # orjson escapes line ends inside strings, so splitting the text at line ends cuts no string.
    typer.echo("\n".join(map(_escape_unprintable, text.split("\n"))))


def print_rows(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, with_header: bool = False
) -> None:
    """Print a table on a terminal; otherwise print lines with tabs between the fields.

    Args:
        columns: The names of the columns.
        rows: The cells of each row.
        with_header: Whether the names of the columns are also printed without a terminal.
    """
    if not sys.stdout.isatty():
        for row in (columns, *rows) if with_header else rows:
            typer.echo("\t".join(_format_cell(cell) for cell in row))
        return
    from workpool.cli.tables import print_table  # noqa: PLC0415 - only people need it; it is slow

    print_table(columns, [[_format_cell(cell) for cell in row] for row in rows])


def print_names_and_values(pairs: Mapping[str, object]) -> None:
    """Print names and values, aligned on a terminal and otherwise with tabs between them."""
    if not sys.stdout.isatty():
        print_rows(("", ""), list(pairs.items()))
        return
    from workpool.cli import tables  # noqa: PLC0415 - only people need it; it is slow

    tables.print_names_and_values({name: _format_cell(value) for name, value in pairs.items()})


def convert_to_protocol_fields(thing: WorkItem | QueueStats) -> dict[str, Any]:
    """Return the fields of an item or of the queue statistics, by their names in the protocol."""
    # Leave out `last_heartbeat`, the same time as `latest_heartbeat_at`, and the item's token,
    # which must not be printed.
    hidden = {"last_heartbeat", "sessions_token"}
    names = [each.name for each in fields(thing) if each.name not in hidden]
    return {name: getattr(thing, name) for name in names}


def format_key_value_pairs(pairs: Any) -> str:
    """Return pairs as `key=value key=value`."""
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def _format_cell(cell: object) -> str:
    if cell is None:
        return "-"
    text = cell.isoformat().replace("+00:00", "Z") if hasattr(cell, "isoformat") else str(cell)
    # Strings from the control plane must not control the terminal or split a line.
    return escape_text(text)


def _escape_unprintable(line: str) -> str:
    """Return a line of JSON with escape sequences for characters that are not printable."""
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in line)
