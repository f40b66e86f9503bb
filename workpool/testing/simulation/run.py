"""Running simulations: one, or as many as a seed, a number and a time allow, on all cores."""

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
from workpool.testing.simulation.invariants import INVARIANTS, judge
from workpool.testing.simulation.machine import run_machines
from workpool.testing.simulation.schedule import Schedule, draw
from workpool.testing.simulation.stage import play
from workpool.testing.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workpool.testing.simulation.case import Case

CHUNK: Final = 50
COLLECT_EVERY: Final = 8
"""A simulation is full of cycles that end with it: looking for garbage meanwhile finds none."""


class Report(NamedTuple):
    """What came of some simulations.

    Attributes:
        troubles: Calls that something befell.
        deeds: What else was done: work, crashes, cuts, stops …
        judged: Invariants that were checked.
        failures: The words of what was broken, by the seed of the schedule.
    """

    schedules: int = 0
    troubles: int = 0
    deeds: int = 0
    judged: int = 0
    failures: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def plus(self, other: Report) -> Report:
        """Both together."""
        return Report(
            self.schedules + other.schedules,
            self.troubles + other.troubles,
            self.deeds + other.deeds,
            self.judged + other.judged,
            self.failures + other.failures,
        )

    def __str__(self) -> str:
        """Say it in one line, and in one more per failure."""
        lines = [
            f"{self.schedules} schedules, {self.troubles} faults, {self.deeds} deeds, "
            f"{self.judged} invariants checked, {len(self.failures)} broken"
        ]
        for seed, words in self.failures:
            lines += [f"seed {seed}: {each}" for each in words[:3]]
            lines.append(f"  replay: python -m workpool.testing.simulation --replay {seed}")
        return "\n".join(lines)


def schedule_of(seed: int) -> Schedule:
    """Draw the schedule of a seed."""
    return draw(random.Random(seed), seed)


def simulate(schedule: Schedule) -> tuple[Case, list[str]]:
    """Carry a schedule out; returns what happened, and what breaks the promise."""

    async def main() -> tuple[Case, list[str]]:
        return await World(schedule, _registry()).live(judge)

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
    """Simulate every seed's schedule, here, as long as `time.monotonic()` is before `until`."""
    report = Report()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number, seed in enumerate(seeds):
            if time.monotonic() >= until:
                break
            case, words = simulate(schedule_of(seed))
            failures = ((seed, tuple(words)),) if words else ()
            trace = case.trace
            report = report.plus(Report(1, trace.troubles, trace.deeds, len(INVARIANTS), failures))
            if number % COLLECT_EVERY == 0:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return report


def simulate_many(seed: int, schedules: int, processes: int) -> Report:
    """Simulate `schedules` from `seed` on, in several processes."""
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
    plugins = loading.load((play,), {})
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
    """Do once what every pool would do again with the same result: nine tenths of its start."""
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
