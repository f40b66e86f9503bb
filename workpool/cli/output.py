"""Results on stdout: one JSON value, a table on a terminal, or plain lines for other programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import orjson
import typer

from workpool.logs import escaped
from workpool.wire.items import QueueStats, WorkItem


def print_json(value: object) -> None:
    """Print one JSON value; times in UTC, with `Z`."""
    option = orjson.OPT_UTC_Z | orjson.OPT_INDENT_2
    text = orjson.dumps(value, default=dict, option=option).decode()
    # What others wrote must not steer this terminal. Line ends stand between values only.
    typer.echo("\n".join(map(_ascii_escapes, text.split("\n"))))


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on a terminal; else the rows alone, their fields separated by tabs."""
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(_text(cell) for cell in row))
        return
    from workpool.cli.tables import print_table  # noqa: PLC0415 - only people need it; it is slow

    print_table(columns, [[_text(cell) for cell in row] for row in rows])


def print_pairs(pairs: Mapping[str, object]) -> None:
    """Names and values for people on a terminal; else a pair a line, separated by a tab."""
    if not sys.stdout.isatty():
        print_rows(("", ""), list(pairs.items()))
        return
    from workpool.cli import tables  # noqa: PLC0415 - only people need it; it is slow

    tables.print_pairs({name: _text(value) for name, value in pairs.items()})


def fields_of(thing: WorkItem | QueueStats) -> dict[str, Any]:
    """An item or the stats as they are printed, by the protocol's names."""
    # `last_heartbeat` is `latest_heartbeat_at` once more, and a token is never shown.
    hidden = {"last_heartbeat", "sessions_token"}
    names = [each.name for each in fields(thing) if each.name not in hidden]
    return {name: getattr(thing, name) for name in names}


def pairs_text(pairs: Any) -> str:
    """`key=value key=value`."""
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    text = cell.isoformat().replace("+00:00", "Z") if hasattr(cell, "isoformat") else str(cell)
    # What others wrote must not steer this terminal, nor make two lines of one.
    return escaped(text)


def _ascii_escapes(line: str) -> str:
    """Write characters that are not printable as JSON escape sequences."""
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in line)
