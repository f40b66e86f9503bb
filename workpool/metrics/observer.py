"""Counts what happens: from each event to the series that the table says it feeds.

Never decides anything, and never raises for an event: a label value that the table does not know is
a bug of ours, shown as a `RuntimeWarning` (which fails a test), and is not counted.
"""

from __future__ import annotations

import itertools
import time
import warnings
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from workpool import events as ev
from workpool.errors import RegistryError
from workpool.metrics.collectors import collectors_of
from workpool.metrics.definitions import DEFINITIONS, ENVIRONMENT, HANDLER
from workpool.metrics.gauges import NullWindow, Source
from workpool.wire.protocol import HEALTHCHECK, SESSION

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from prometheus_client import CollectorRegistry

    from workpool.metrics.collectors import Collectors
    from workpool.metrics.definitions import Definition
    from workpool.metrics.gauges import PoolSnapshot
    from workpool.metrics.stores import Add, Store


def _unix_time() -> float:
    return datetime.now(UTC).timestamp()


def _leave_out(_: float) -> None:
    """Takes the place of a series that the metric does not have."""


class _Series(dict["Hashable", "Add"]):
    """How to add to each series of one metric in one environment, by its other labels' values.

    A single such label is the key itself, otherwise the key is the tuple of their values. A series
    with a run-time label is made when first asked for, all its closed companions with it at 0:
    `rate()` does not see the beginning of a series that begins at 1.
    """

    def __init__(self, store: Store, row: Definition, environment_id: str) -> None:
        super().__init__(dict.fromkeys(row.skips, _leave_out))
        self._store = store
        self._row = row
        self._environment_id = environment_id
        self.labels = tuple(label for label in row.labels if label != ENVIRONMENT)
        if all(row.labels[label] for label in self.labels):
            self.prime({})

    def __missing__(self, key: Hashable) -> Add:
        values = key if isinstance(key, tuple) else (key,)
        given = dict(zip(self.labels, values, strict=True))
        for label, value in given.items():
            closed = self._row.labels[label]
            if closed and value not in closed:
                text = f"{self._row.full_name} has no {label}={value!r}; not counted"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
                return _leave_out
        self.prime(given)
        return self[key]

    def prime(self, given: Mapping[str, Hashable]) -> None:
        """Make all series that have the given values of the run-time labels."""
        choices = (self._row.labels[label] or (given[label],) for label in self.labels)
        for values in itertools.product(*choices):
            environment = (self._environment_id,) if ENVIRONMENT in self._row.labels else ()
            add = self._store.series((*environment, *map(str, values)))
            self[values[0] if len(values) == 1 else values] = add


def _item_type(event: ev.ItemClaimed) -> str:
    return event.item.type if event.item.type in {SESSION, HEALTHCHECK} else "other"


def _reader(labels: tuple[str, ...]) -> Callable[[Any], Hashable]:
    """Read an event's key in `_Series`: its attributes of the labels' names."""
    if "type" not in labels:
        return attrgetter(*labels)
    other, _ = labels
    read = attrgetter(other)
    return lambda event: (read(event), _item_type(event))


def _feed(series: _Series, value: str | None) -> Callable[[Any], object]:
    """What one event adds to one metric: its attribute `value`, or 1. None adds nothing."""
    amount_of = None if value is None else attrgetter(value)
    if not series.labels:
        add = series[()]
        return (lambda _: add(1)) if amount_of is None else _measure(amount_of, lambda _: add)
    key_of = _reader(series.labels)
    if amount_of is None:
        return lambda event: series[key_of(event)](1)
    return _measure(amount_of, lambda event: series[key_of(event)])


def _measure(
    amount_of: Callable[[Any], float | None], add_of: Callable[[Any], Add]
) -> Callable[[Any], object]:
    """Add an event's amount, unless it is None."""

    def observe(event: Any) -> None:
        amount = amount_of(event)
        if amount is not None:
            add_of(event)(amount)

    return observe


@dataclass(eq=False, repr=False)
class Metrics:
    """The metrics of one supervisor, on a registry that it may share with others.

    Once open, `observe` and `request` may be called on any thread. Closing takes this supervisor's
    gauges away; its counters stay, and what happens late is still counted.

    Attributes:
        snapshot: Called at every scrape on the thread that scrapes, so quick and safe there.
        handlers: Handlers known beforehand, shown with 0 until they have a session.
        clock: Monotonic seconds.
        now: Unix time in seconds.
    """

    registry: CollectorRegistry
    environment_id: str
    _: KW_ONLY
    dialect: str
    version: str
    snapshot: Callable[[], PoolSnapshot]
    handlers: Iterable[str] = ()
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = _unix_time
    _series: dict[str, _Series] = field(init=False)
    _requests: _Series = field(init=False)
    _request_durations: _Series = field(init=False)
    _feeds: dict[type[ev.Event], list[Callable[[Any], object]]] = field(init=False)
    _source: Source = field(init=False)
    _shared: Collectors | None = field(default=None, init=False)

    def open(self) -> None:
        """Show the gauges, and with 0 every series that is known beforehand.

        Raises:
            RegistryError: Open already, or the registry holds somebody else's metric of our name.
        """
        if self._shared is not None:
            raise RegistryError("these metrics are open already")
        shared = collectors_of(self.registry)
        self._source = Source(
            self.environment_id, self.version, self.dialect, self.snapshot,
            NullWindow(self.clock), self.now,
        )  # fmt: skip
        self._series = {
            row.name: _Series(shared.stores[row.name], row, self.environment_id)
            for row in DEFINITIONS
            if row.name in shared.stores
        }
        self._requests = self._series["http_requests_total"]
        self._request_durations = self._series["http_request_duration_seconds"]
        self._feeds = self._wire()
        for handler in self.handlers:
            self._see(handler)
        shared.attach(self._source)
        self._shared = shared

    def close(self) -> None:
        """Take the gauges away. Harmless when not open."""
        if self._shared is not None:
            self._shared.detach(self._source)
            self._shared = None

    def observe(self, event: ev.Event) -> None:
        """Count one fact."""
        for feed in self._feeds.get(type(event), ()):
            feed(event)

    def request(self, op: str, code: str, seconds: float) -> None:
        """Count one HTTP request: `RequestFinished` without the event, for the busiest path."""
        self._requests[op, code](1)
        self._request_durations[op](seconds)

    def _wire(self) -> dict[type[ev.Event], list[Callable[[Any], object]]]:
        feeds: dict[type[ev.Event], list[Callable[[Any], object]]] = {
            ev.PollFinished: [self._on_poll],
            ev.QueueStatsRead: [self._on_stats],
            ev.SessionStarted: [lambda event: self._see(event.handler)],
        }
        for row in DEFINITIONS:
            if row.event is not None:
                feeds.setdefault(row.event, []).append(_feed(self._series[row.name], row.value))
        return feeds

    def _on_poll(self, event: ev.PollFinished) -> None:
        if event.result in {"item", "null"}:
            self._source.polls.add(null=event.result == "null")

    def _on_stats(self, event: ev.QueueStatsRead) -> None:
        self._source.remote = (self.now(), event.stats)

    def _see(self, handler: str) -> None:
        """Show a handler from its first session on, also where it has none yet."""
        if handler in self._source.handlers:
            return
        self._source.handlers.add(handler)
        for series in self._series.values():
            if HANDLER in series.labels:
                series.prime({HANDLER: handler})
