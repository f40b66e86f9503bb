"""Runs simulations: one schedule, or many schedules in several processes."""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import random
import time
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, TypeVar

from prometheus_client import CollectorRegistry

from tests.simulation.invariants import INVARIANTS, check_invariants
from tests.simulation.schedule import Schedule, generate_schedule
from tests.simulation.scripted_handlers import PLUGINS
from tests.simulation.simulated_machine import run_machines
from tests.simulation.simulated_world import SimulatedWorld
from tests.simulation.simulation_report import ProgressFile, SimulationReport
from workpool.metrics import observer
from workpool.plugins import loading, registry
from workpool.pool import telemetry
from workpool.wire.http import resolver

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator
    from pathlib import Path

    from tests.simulation.finished_simulation import FinishedSimulation

T = TypeVar("T")

PART: Final = 50
"""Number of schedules that a process simulates at a time."""
COLLECT_EVERY: Final = 8
"""Garbage is collected after so many simulations: during one, a collection finds nothing."""


def generate_schedule_for_seed(seed: int) -> Schedule:
    """Return the schedule that a seed determines."""
    return generate_schedule(random.Random(seed), seed)


def simulate_schedule(schedule: Schedule) -> tuple[FinishedSimulation, list[str]]:
    """Run a schedule, and return the finished simulation and its violations of invariants."""

    async def main() -> tuple[FinishedSimulation, list[str]]:
        return await SimulatedWorld(schedule, metrics_registry()).run_simulation(check_invariants)

    return run_seeded_simulation(main, schedule.seed, PLUGINS)


def run_seeded_simulation(
    main: Callable[[], Coroutine[Any, Any, T]], seed: int, plugins: tuple[object, ...]
) -> T:
    """Run `main()`, which simulates pools with these plugins, and return its result.

    The random module is seeded, so that each run with the same `seed` has the same result. No log
    record is written.
    """
    state, disabled = random.getstate(), logging.root.manager.disable
    random.seed(seed)
    logging.disable(logging.CRITICAL)
    try:
        with _replace_slow_steps_of_pool_start(plugins):
            result: T = run_machines(main)
    finally:
        random.setstate(state)
        logging.disable(disabled)
    return result


def simulate_seeds(seeds: Iterable[int], until: float = float("inf")) -> SimulationReport:
    """Simulate these seeds in this process, until `time.monotonic()` reaches `until`."""
    report = SimulationReport()
    for seed in iterate_with_rare_garbage_collection(seeds):
        if time.monotonic() >= until:
            break
        case, violations = simulate_schedule(generate_schedule_for_seed(seed))
        failures = ((seed, tuple(violations)),) if violations else ()
        trace = case.trace
        report = report.add_report(
            SimulationReport(1, trace.faults, trace.actions, len(INVARIANTS), failures)
        )
    return report


def iterate_with_rare_garbage_collection(seeds: Iterable[int]) -> Iterator[int]:
    """Yield the seeds. Collect garbage only after every eighth seed, to save CPU time."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number, seed in enumerate(seeds):
            yield seed
            if number % COLLECT_EVERY == 0:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()


def simulate_in_parallel(
    seed: int, schedules: int, processes: int, file: Path | None = None
) -> SimulationReport:
    """Run `schedules` simulations in several processes, with consecutive seeds from `seed` on.

    With a `file`, each finished part is added to it, and parts that it has are not simulated again.
    """
    parts = [
        range(first, min(first + PART, seed + schedules))
        for first in range(seed, seed + schedules, PART)
    ]
    progress = None if file is None else ProgressFile(file)
    finished = {} if progress is None else progress.read_reports_by_seed_range()
    report = functools.reduce(
        SimulationReport.add_report,
        (finished[p] for p in parts if p in finished),
        SimulationReport(),
    )
    missing = [part for part in parts if part not in finished]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for part, result in pool.imap_unordered(_simulate_range_of_seeds, missing):
            if progress is not None:
                progress.append_report_of_seed_range(part, result)
            report = report.add_report(result)
    return report


def _simulate_range_of_seeds(seeds: range) -> tuple[range, SimulationReport]:
    return seeds, simulate_seeds(seeds)


@functools.cache
def metrics_registry() -> CollectorRegistry:
    """Return the metrics registry that all simulations of this process share."""
    return CollectorRegistry()


@functools.cache
def _load_plugins_once(given: tuple[object, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    plugins = loading.load_and_check_plugins(given, {})
    return plugins, registry._sort_hooks_by_calling_order(plugins)


@functools.cache
def _cached_distribution_version(name: str) -> str:
    return metadata.version(name)


_MetricSeries: Final = observer._MetricSeries
_series: Final[dict[object, observer._MetricSeries]] = {}


def _get_cached_metric_series(metric: Any, *rest: Any) -> observer._MetricSeries:
    if metric not in _series:
        _series[metric] = _MetricSeries(metric, *rest)
    return _series[metric]


@contextmanager
def _replace_slow_steps_of_pool_start(given: tuple[object, ...]) -> Iterator[None]:
    """Replace by cached results the steps that take 90 % of the CPU time of a pool's start.

    The cached results are the loaded plugins, their hooks, and the series of metrics.
    """
    plugins, hooks = _load_plugins_once(given)
    replaced = [
        (registry, "load_and_check_plugins", lambda *_: plugins),
        (registry, "_sort_hooks_by_calling_order", lambda _: hooks),
        (observer, "_MetricSeries", _get_cached_metric_series),
        (telemetry, "version", _cached_distribution_version),
        (resolver, "_look_up_host", lambda *_: []),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, new in replaced:
        setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)
