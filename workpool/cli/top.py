"""`workpool top`: shows workers in a terminal; reads `/live.json` from each worker's exporter.

See workpool/docs/operating.md, "The live page".
"""

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import aiohttp
import orjson
import typer

from workpool.cli import exits
from workpool.cli.help_text import format_examples_section
from workpool.cli.output import print_rows
from workpool.logs import readable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

DEFAULT_URL: Final = "http://127.0.0.1:9464"
ANSWER_SECONDS: Final = 3.0
ANSWER_BYTES: Final = 1024 * 1024
TEXT_CHARACTERS: Final = 120
SESSIONS_SHOWN: Final = 20
"""Sessions that a terminal shows; `--once` prints all that workers send."""
EXAMPLES: Final = format_examples_section(
    "workpool top",
    "workpool top http://127.0.0.1:9464 http://127.0.0.1:9465",
    "workpool top --once",
)

WORKER_COLUMNS: Final = (
    *("worker", "state", "busy", "free", "waiting", "poll", "null", "completed", "failed", "lost"),
    "why not ready",
)
SESSION_COLUMNS: Final = (
    *("session", "handler", "age", "attempt", "lease left", "silent for"),
    "worker",
)

Row = tuple[str, ...]
Status = dict[str, Any]
"""The JSON of one worker, or `{"error": …}`."""


def top(
    urls: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="URL", help=f"The `metrics_listen` of each worker. Default: {DEFAULT_URL}."
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.5, max=3600, help="Seconds between two looks.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
) -> None:
    """Show workers and their sessions in the terminal, until Ctrl-C.

    Without a terminal, one look is printed. Ends with 1 if no worker answers then.
    """
    chosen = tuple(url.rstrip("/") for url in urls or [DEFAULT_URL])
    if once or not sys.stdout.isatty():
        statuses = asyncio.run(_read_statuses(chosen))
        print_rows(WORKER_COLUMNS, _make_worker_rows(chosen, statuses), with_header=True)
        print_rows(SESSION_COLUMNS, _make_session_rows(statuses), with_header=True)
        raise typer.Exit(exits.FAILED if all("error" in each for each in statuses) else exits.OK)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_refresh_until_interrupted(chosen, interval))


async def _refresh_until_interrupted(urls: "Sequence[str]", interval: float) -> None:
    from rich.console import Group  # noqa: PLC0415 - only for a terminal
    from rich.live import Live  # noqa: PLC0415 - only for a terminal

    with Live(screen=True, auto_refresh=False) as live:
        while True:
            statuses = await _read_statuses(urls)
            workers = _new_status_table(WORKER_COLUMNS, _make_worker_rows(urls, statuses))
            sessions = _new_status_table(
                SESSION_COLUMNS, _make_session_rows(statuses)[:SESSIONS_SHOWN]
            )
            live.update(Group(workers, sessions), refresh=True)
            await asyncio.sleep(interval)


async def _read_statuses(urls: "Sequence[str]") -> list[Status]:
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        return await asyncio.gather(*(_read_status(http, url) for url in urls))


async def _read_status(http: aiohttp.ClientSession, url: str) -> Status:
    """Return the status of one worker; if it cannot be read, a mapping with the key `error`."""
    try:
        async with http.get(f"{url}/live.json") as answer:
            body = await answer.content.read(ANSWER_BYTES)
            if not answer.ok:
                return {"error": f"status {answer.status}"}
        status = orjson.loads(body)
    except aiohttp.InvalidURL:
        return {"error": "not a URL"}
    except (aiohttp.ClientError, TimeoutError) as error:
        return {"error": readable(str(error) or "no answer in time", TEXT_CHARACTERS)}
    except orjson.JSONDecodeError:
        return {"error": "not a worker: its answer is not JSON"}
    return status if isinstance(status, dict) and "reasons" in status else {"error": "not a worker"}


def _make_worker_rows(urls: "Sequence[str]", statuses: "Sequence[Status]") -> "list[Row]":
    return [
        _make_printable_cells(_make_worker_cells(url, part))
        for url, status in zip(urls, statuses, strict=True)
        for part in _list_environment_statuses(status)
    ]


def _list_environment_statuses(status: Status) -> "list[Status]":
    """Return the statuses of the environments of a worker, from the worker's `status`.

    Return `[status]` if `status` has no list of environments.
    """
    found = status.get("environments")
    if not isinstance(found, list):
        return [status]
    worker = status.get("worker_id", "")
    return [
        {**each, "worker_id": f"{worker} {each.get('environment_id', '')}"}
        for each in found
        if isinstance(each, dict) and "reasons" in each
    ]


def _make_worker_cells(url: str, status: Status) -> tuple[object, ...]:
    if "error" in status:
        return (url, "no answer", *[""] * 8, status["error"])
    slots, queue = status.get("slots", {}), status.get("queue", {})
    polls, outcomes = status.get("polls", {}), status.get("outcomes", {})
    reasons = status["reasons"]
    return (
        status.get("worker_id", url),
        "not ready" if reasons else "ready",
        slots.get("busy", 0),
        slots.get("free", 0),
        queue.get("waiting", 0) + queue.get("set_aside", 0),
        _seconds_text(_divide_or_none(polls.get("seconds", 0), polls.get("answers", 0))),
        _percent_text(
            _divide_or_none(polls.get("null", 0), polls.get("item", 0) + polls.get("null", 0))
        ),
        round(outcomes.get("completed", 0)),
        round(sum(outcomes.get(name, 0) for name in ("failed", "timed_out", "stalled"))),
        round(outcomes.get("lease_lost", 0)),
        "; ".join(map(str, reasons)),
    )


def _make_session_rows(statuses: "Sequence[Status]") -> "list[Row]":
    """Return a row for each session of all workers, the oldest session first."""
    found = [
        (session, status.get("worker_id", ""))
        for status in statuses
        for session in status.get("sessions", ())
    ]
    found.sort(key=lambda each: -each[0].get("age_seconds", 0))
    return [
        _make_printable_cells(_make_session_cells(session, worker)) for session, worker in found
    ]


def _make_session_cells(session: "Mapping[str, Any]", worker: str) -> tuple[object, ...]:
    return (
        session.get("session_id", "not shown"),
        session.get("handler", ""),
        _seconds_text(session.get("age_seconds")),
        session.get("attempt", ""),
        _seconds_text(session.get("lease_seconds")),
        _seconds_text(session.get("silence_seconds")),
        worker,
    )


def _new_status_table(columns: "Sequence[str]", rows: "Sequence[Row]") -> "Table":
    from rich import box  # noqa: PLC0415 - only for a terminal
    from rich.table import Table  # noqa: PLC0415 - only for a terminal
    from rich.text import Text  # noqa: PLC0415 - only for a terminal

    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _make_printable_cells(values: "Sequence[object]") -> "Row":
    """Return the values as text, without the control characters that a worker could have sent."""
    return tuple(readable(str(value), TEXT_CHARACTERS) for value in values)


def _divide_or_none(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent_text(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _seconds_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.0f} s"
