"""The cost of each part and setting of the pool, as the difference of runs with and without it.

    python benchmarks/pool_part_costs.py [--items N] [--rounds N] [--only NAME …]

Measures as throughput.py does. The first program, with which the others are compared, is the pool
with its defaults. A setting that is off by default costs nothing there, and the difference is its
cost when it is on.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pkgutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compared_programs import (
    BenchmarkEntry,
    parse_selected_programs,
    run_bare_aiohttp_loop,
    run_pool,
    run_workpool_client_loop,
)
from throughput import compare_programs

from workpool import hookimpl
from workpool.log_fields import PoolIds
from workpool.logs import JsonFormatter, TextFormatter
from workpool.testing.loop_supervisor import ThreadlessSupervisor

if TYPE_CHECKING:
    from benchmark_runs import ControlPlaneAddress, ProgramMeter

    from workpool.events import Event, SessionFinished


class AllEventsObserver:
    """A plugin that receives all events and ignores them."""

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        pass


class SingleEventObserver:
    """A plugin that observes one type of event."""

    @hookimpl
    def workpool_event(self, event: SessionFinished) -> None:
        pass


class SessionWrappingPlugin:
    """A plugin that wraps every session in a context manager that does nothing."""

    @hookimpl
    def workpool_wrap_session(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()


def do_nothing(*_: object) -> None:
    pass


async def run_pool_with_disabled_function(
    function: str, plane: ControlPlaneAddress, meter: ProgramMeter
) -> None:
    """Run items in a pool after replacing the given function by one that does nothing.

    `function`: `module:name` or `module:Class.name`, since a module cannot be sent to a process.
    """
    module, _, path = function.partition(":")
    *classes, name = path.split(".")
    owner = ":".join((module, ".".join(classes)))
    setattr(pkgutil.resolve_name(owner), name, do_nothing)
    await run_pool(plane, meter)


async def run_pool_with_logging(
    formatter: logging.Formatter, plane: ControlPlaneAddress, meter: ProgramMeter
) -> None:
    """Run items in a pool that logs like `workpool run` at INFO, to the null device."""
    with Path(os.devnull).open("w") as nowhere:  # noqa: ASYNC230 - opened once, before the run
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(formatter)
        handler.addFilter(PoolIds())
        logging.basicConfig(level="INFO", handlers=[handler], force=True)
        await run_pool(plane, meter)


def make_pool_entry(name: str, **changed: Any) -> BenchmarkEntry:
    """Return a benchmark entry that runs a pool with changed settings, plugins or supervisor."""
    return BenchmarkEntry(name, partial(run_pool, **changed), "workpool")


def make_pool_entry_with_disabled_function(name: str, function: str) -> BenchmarkEntry:
    """Return a benchmark entry that runs a pool in which the given function does nothing."""
    pkgutil.resolve_name(function)
    return BenchmarkEntry(name, partial(run_pool_with_disabled_function, function), "workpool")


ENTRIES = (
    make_pool_entry("workpool"),
    BenchmarkEntry("bare", run_bare_aiohttp_loop, "aiohttp"),
    BenchmarkEntry("client only", run_workpool_client_loop, "workpool"),
    make_pool_entry_with_disabled_function("metrics off", "workpool.metrics:Metrics.count"),
    make_pool_entry_with_disabled_function(
        "session log left out", "workpool.pool.session_runner:_log_session_end"
    ),
    BenchmarkEntry("INFO as text", partial(run_pool_with_logging, TextFormatter()), "workpool"),
    BenchmarkEntry("INFO as JSON", partial(run_pool_with_logging, JsonFormatter()), "workpool"),
    make_pool_entry("an observer", plugins=(AllEventsObserver,)),
    make_pool_entry("an observer of one type", plugins=(SingleEventObserver,)),
    make_pool_entry("a wrapper", plugins=(SessionWrappingPlugin,)),
    make_pool_entry("one loop", supervisor=ThreadlessSupervisor),
    make_pool_entry("stats_interval=0", stats_interval=0),
    make_pool_entry("stats_interval=1", stats_interval=1),
    make_pool_entry("rates=100000", read_rate=100_000, write_rate=100_000),
    make_pool_entry("session_timeout=60", session_timeout=60),
    make_pool_entry("max_attempts=3", max_attempts=3),
    make_pool_entry("prefetch=8", prefetch=8),
    make_pool_entry("metrics_listen=:0", metrics_listen="127.0.0.1:0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each part and setting costs.")
    parser.add_argument("--items", type=int, default=1000, help="per program and round")
    parser.add_argument("--rounds", type=int, default=7)
    options, entries = parse_selected_programs(parser, entries=ENTRIES)
    compare_programs(entries, options.items, options.rounds)


if __name__ == "__main__":
    main()
