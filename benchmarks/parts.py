"""The cost of each part and setting of the pool: the same run without the part or with a change.

    python benchmarks/parts.py [--items N] [--rounds N] [--only NAME …]

Measures as throughput.py does. The first contender, with which the others are compared, is the pool
with its defaults. A setting that is off by default costs nothing there, and the difference is its
cost when it is on.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contenders import Entry, bare, client, parse_contenders, workpool
from throughput import compare

from workpool import hookimpl
from workpool.log_fields import PoolIds
from workpool.logs import JsonFormatter, TextFormatter
from workpool.metrics import Metrics
from workpool.pool import session_runner
from workpool.testing.loop_supervisor import LoopSupervisor

if TYPE_CHECKING:
    from arena import Meter, Plane

    from workpool.events import Event, SessionFinished


class Observer:
    """A plugin that receives all events and ignores them."""

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        pass


class OneTypeObserver:
    """A plugin that observes one type of event."""

    @hookimpl
    def workpool_event(self, event: SessionFinished) -> None:
        pass


class Wrapper:
    """A plugin that wraps every session in a context without effect."""

    @hookimpl
    def workpool_wrap_session(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()


def ignore(*_: object) -> None:
    pass


async def without(owner: object, names: tuple[str, ...], plane: Plane, meter: Meter) -> None:
    """The pool after some methods of a class were replaced by no-ops, in this process only."""
    for name in names:
        setattr(owner, name, ignore)
    await workpool(plane, meter)


async def logged(formatter: logging.Formatter, plane: Plane, meter: Meter) -> None:
    """The pool with the log of `workpool run` at INFO, written to the null device."""
    with Path(os.devnull).open("w") as nowhere:  # noqa: ASYNC230 - opened once, before the run
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(formatter)
        handler.addFilter(PoolIds())
        logging.basicConfig(level="INFO", handlers=[handler], force=True)
        await workpool(plane, meter)


def pool(name: str, **changed: Any) -> Entry:
    """Return an entry for the pool with these arguments changed."""
    return Entry(name, partial(workpool, **changed), "workpool")


def lacking(name: str, owner: object, *names: str) -> Entry:
    """Return an entry for the pool without these methods of `owner`."""
    return Entry(name, partial(without, owner, names), "workpool")


ENTRIES = (
    pool("workpool"),
    Entry("bare", bare, "aiohttp"),
    Entry("client only", client, "workpool"),
    lacking("metrics off", Metrics, "count"),
    lacking("session log left out", session_runner, "_log_end"),
    Entry("INFO as text", partial(logged, TextFormatter()), "workpool"),
    Entry("INFO as JSON", partial(logged, JsonFormatter()), "workpool"),
    pool("an observer", plugins=(Observer,)),
    pool("an observer of one type", plugins=(OneTypeObserver,)),
    pool("a wrapper", plugins=(Wrapper,)),
    pool("one loop", supervisor=LoopSupervisor),
    pool("stats_interval=0", stats_interval=0),
    pool("stats_interval=1", stats_interval=1),
    pool("rates=100000", read_rate=100_000, write_rate=100_000),
    pool("session_timeout=60", session_timeout=60),
    pool("max_attempts=3", max_attempts=3),
    pool("prefetch=8", prefetch=8),
    pool("metrics_listen=:0", metrics_listen="127.0.0.1:0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each part and setting costs.")
    parser.add_argument("--items", type=int, default=1000, help="per contender and round")
    parser.add_argument("--rounds", type=int, default=7)
    options, entries = parse_contenders(parser, entries=ENTRIES)
    compare(entries, options.items, options.rounds)


if __name__ == "__main__":
    main()
