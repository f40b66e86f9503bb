"""Runs simulations: one schedule, or many on all cores."""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import random
import time
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from prometheus_client import CollectorRegistry

from workpool.metrics import observer
from workpool.plugins import asking, loading
from workpool.pool import telemetry
from workpool.testing.simulation.handlers import simulated
from workpool.testing.simulation.invariants import INVARIANTS, judge
from workpool.testing.simulation.machine import run_machines
from workpool.testing.simulation.schedule import Schedule, draw
from workpool.testing.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workpool.testing.simulation.case import Case

CHUNK: Final = 50
COLLECT_EVERY: Final = 8
"""Garbage is collected after so many simulations: during one, a collection finds nothing."""


class Report(NamedTuple):
    """The result of some simulations.

    Attributes:
        faults: Number of calls with a fault.
        actions: Number of actions: work, crashes, cuts, stops …
        checked: Number of invariants checked.
        failures: Seed and violations of each schedule that violated an invariant.
    """

    schedules: int = 0
    faults: int = 0
    actions: int = 0
    checked: int = 0
    failures: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def plus(self, other: Report) -> Report:
        """Return the sum of two reports."""
        return Report(
            self.schedules + other.schedules,
            self.faults + other.faults,
            self.actions + other.actions,
            self.checked + other.checked,
            self.failures + other.failures,
        )

    def __str__(self) -> str:
        """Return one line with the numbers, then lines for each failure."""
        lines = [
            f"{self.schedules} schedules, {self.faults} faults, {self.actions} actions, "
            f"{self.checked} invariants checked, {len(self.failures)} broken"
        ]
        for seed, violations in self.failures:
            lines += [f"seed {seed}: {each}" for each in violations[:3]]
            lines.append(f"  replay: python -m workpool.testing.simulation --replay {seed}")
        return "\n".join(lines)


def schedule_of(seed: int) -> Schedule:
    """Return the schedule of a seed."""
    return draw(random.Random(seed), seed)


def simulate(schedule: Schedule) -> tuple[Case, list[str]]:
    """Run a schedule, and return what happened and the violations of the invariants."""

    async def main() -> tuple[Case, list[str]]:
        return await World(schedule, _registry()).run(judge)

    state, disabled = random.getstate(), logging.root.manager.disable
    random.seed(schedule.seed)
    logging.disable(logging.CRITICAL)
    try:
        with _shortcuts():
            result: tuple[Case, list[str]] = run_machines(main)
    finally:
        random.setstate(state)
        logging.disable(disabled)
    return result


def simulate_all(seeds: Iterable[int], until: float = float("inf")) -> Report:
    """Simulate the seeds in this process, as long as `time.monotonic()` is before `until`."""
    report = Report()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number, seed in enumerate(seeds):
            if time.monotonic() >= until:
                break
            case, violations = simulate(schedule_of(seed))
            failures = ((seed, tuple(violations)),) if violations else ()
            trace = case.trace
            report = report.plus(Report(1, trace.faults, trace.actions, len(INVARIANTS), failures))
            if number % COLLECT_EVERY == 0:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return report


def simulate_many(seed: int, schedules: int, processes: int) -> Report:
    """Simulate the seeds from `seed` to `seed + schedules - 1` in several processes."""
    chunks = [
        range(first, min(first + CHUNK, seed + schedules))
        for first in range(seed, seed + schedules, CHUNK)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return functools.reduce(Report.plus, pool.imap_unordered(simulate_all, chunks), Report())


@functools.cache
def _registry() -> CollectorRegistry:
    return CollectorRegistry()


@functools.cache
def _loaded() -> tuple[tuple[Any, ...], dict[str, Any]]:
    plugins = loading.load((simulated,), {})
    return plugins, asking._in_order(plugins)


@functools.cache
def _version(name: str) -> str:
    return metadata.version(name)


_Series: Final = observer._Series
_series: Final[dict[object, observer._Series]] = {}


def _series_of(metric: Any, *rest: Any) -> observer._Series:
    if metric not in _series:
        _series[metric] = _Series(metric, *rest)
    return _series[metric]


@contextmanager
def _shortcuts() -> Iterator[None]:
    """Cache what each pool's start would compute again: nine tenths of the cost of a start."""
    plugins, hooks = _loaded()
    replaced = [
        (asking, "load", lambda *_: plugins),
        (asking, "_in_order", lambda _: hooks),
        (observer, "_Series", _series_of),
        (telemetry, "version", _version),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, new in replaced:
        setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)
