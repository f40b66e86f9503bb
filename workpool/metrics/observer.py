"""Counts events in the metrics that `workpool.metrics.definitions` lists.

`count` takes the type of an event and the values of its fields, in their order, so that no object
is created for the event. Counting never raises. A label value that is missing in the table is a bug
of workpool: the event is not counted, and a `RuntimeWarning` makes a test fail.
See workpool/docs/decisions.md, "Metrics are an observer" and
"Counters and histograms have stores of their own".
"""

from __future__ import annotations

import itertools
import time
import warnings
from bisect import bisect_left
from dataclasses import KW_ONLY, dataclass, field, fields
from datetime import UTC, datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from workpool import events as ev
from workpool.errors import RegistryError
from workpool.log_fields import pool_logger
from workpool.metrics.collectors import collector_for_registry
from workpool.metrics.definitions import (
    DEFINITIONS,
    ENVIRONMENT,
    HANDLER,
    HANDLERS_MAX,
    OTHER_HANDLERS,
)
from workpool.metrics.gauges import GaugeValueSource, RecentPollCounter
from workpool.metrics.metric_values import CounterSeries, HistogramSeries
from workpool.wire.protocol import HEALTHCHECK, SESSION

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from prometheus_client import CollectorRegistry

    from workpool.metrics.collectors import MetricsCollector
    from workpool.metrics.definitions import MetricDefinition
    from workpool.metrics.gauges import PoolSnapshot
    from workpool.metrics.metric_values import MetricStore, Series
    from workpool.wire.items import QueueStats

    Values = tuple[Any, ...]
    """The values of an event's fields, in their order."""
    Callback = Callable[..., object]
    """A function of the values of an event's fields, in their order."""
    EventType = Callable[..., ev.Event]
    """A class of `Event`, as a function that returns an event."""

log = pool_logger(__name__)

_FIELDS: Final = {
    event_type: tuple(field.name for field in fields(event_type))
    for event_type in get_args(ev.Event)
}


def _unix_time() -> float:
    return datetime.now(UTC).timestamp()


class _DiscardingSeries:
    """A series that ignores all amounts, for label values that a metric leaves out on purpose."""

    def add(self, _: float) -> None:
        """Do nothing: the amount is not counted."""


_LEFT_OUT: Final = _DiscardingSeries()


class _MetricSeries(dict["Hashable", "Series"]):
    """The series of one metric in one environment, with the values of the other labels as keys.

    The key is the value of the only other label, or the tuple of the values of several. A series
    with a run-time label is created at its first use, together with those for all closed values of
    the other labels, at 0: `rate()` misses the first increase of a series that begins at 1.
    """

    def __init__(
        self,
        store: MetricStore,
        row: MetricDefinition,
        environment_id: str,
        ensure_handler_label: Callable[[str], str],
    ) -> None:
        super().__init__(dict.fromkeys(row.skips, _LEFT_OUT))
        self._ensure_handler_label = ensure_handler_label
        self._store = store
        self._row = row
        self._environment_id = environment_id
        self.labels = tuple(label for label in row.labels if label != ENVIRONMENT)
        if all(row.labels[label] for label in self.labels):
            self.create_series({})

    def __missing__(self, key: Hashable) -> Series:
        values = key if isinstance(key, tuple) else (key,)
        given = dict(zip(self.labels, values, strict=True))
        for label, value in given.items():
            closed = self._row.labels[label]
            if closed and value not in closed:
                text = f"{self._row.prefixed_name} has no {label}={value!r}; not counted"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
                return _LEFT_OUT
        if HANDLER in given:
            return self._find_handler_series(given)
        self.create_series(given)
        return self[key]

    def _find_handler_series(self, given: dict[str, Any]) -> Series:
        # Handlers beyond a limit share one series: a series for each could use unlimited memory.
        given[HANDLER] = self._ensure_handler_label(given[HANDLER])
        return self[_make_series_key(given.values())]

    def create_series(self, given: Mapping[str, Hashable]) -> None:
        """Create a series of this metric for each combination of label values.

        `given` has the values of labels such as `handler`, whose values are known at run time only.
        """
        choices = (self._row.labels[label] or (given[label],) for label in self.labels)
        for values in itertools.product(*choices):
            environment = (self._environment_id,) if ENVIRONMENT in self._row.labels else ()
            series = self._store.get_or_create_series((*environment, *map(str, values)))
            self[_make_series_key(values)] = series


def _make_series_key(values: Iterable[Hashable]) -> Hashable:
    """Return the key in `_MetricSeries` for these label values."""
    key = tuple(values)
    return key[0] if len(key) == 1 else key


class _SeriesUpdateRule(NamedTuple):
    """A rule for one type of events and one metric: the series to change, and the amount to add.

    Attributes:
        key_of: Returns the key of the series, from the event's values.
        amount_at: The index of the amount in the event's values; None: the amount is 1.
    """

    series: _MetricSeries
    key_of: Callable[[Values], Hashable]
    amount_at: int | None


class _SeriesOfEvent(NamedTuple):
    """The series that change when an event with certain labels is counted.

    Attributes:
        counts: Counters of events.
        spreads: Histograms, each with the index of the amount in the event's values.
        others: Counters of amounts, and the library's metrics; an index of None: the amount is 1.
    """

    counts: list[CounterSeries]
    spreads: list[tuple[HistogramSeries, int]]
    others: list[tuple[Series, int | None]]


class _EventMetricRules:
    """The rules by which events of one type change metrics, and the callbacks for these events.

    Attributes:
        callbacks: Called with the values of each event.
        labels_of: Returns the values of all labels of these metrics, from the event's values.
        targets: The series by the labels from `labels_of`: finding them again for each event would
            cost more than the counting.
    """

    def __init__(self, event_type: type[ev.Event]) -> None:
        self.callbacks: list[Callback] = []
        self.labels_of: Callable[[Values], Hashable] = _NO_LABELS
        self.targets: dict[Hashable, _SeriesOfEvent] = {}
        self._names = _FIELDS[event_type]
        self._effects: list[_SeriesUpdateRule] = []
        self._labels: tuple[str, ...] = ()

    def add_metric(self, series: _MetricSeries, row: MetricDefinition) -> None:
        """Add a metric that events of this type change."""
        names, labels = self._names, series.labels
        amount_at = None if row.value is None else names.index(row.value)
        self._effects.append(
            _SeriesUpdateRule(series, _make_label_reader(labels, names), amount_at)
        )
        self._labels = tuple(dict.fromkeys((*self._labels, *labels)))
        self.labels_of = _make_label_reader(self._labels, names)

    def find_series_of_event(self, labels: Hashable, values: Values) -> _SeriesOfEvent:
        """Return the series that an event changes.

        Store them in `targets` for later events with the same labels.
        """
        targets = _SeriesOfEvent([], [], [])
        known = True
        for effect in self._effects:
            key = effect.key_of(values)
            series = effect.series[key]
            known = known and key in effect.series
            if isinstance(series, CounterSeries) and effect.amount_at is None:
                targets.counts.append(series)
            elif isinstance(series, HistogramSeries) and effect.amount_at is not None:
                targets.spreads.append((series, effect.amount_at))
            else:
                targets.others.append((series, effect.amount_at))
        # Do not store the series of handlers that are counted as `other`: the number of these
        # handlers has no limit, so `targets` could use unlimited memory.
        if known:
            self.targets[labels] = targets
        return targets


_NO_LABELS: Final = itemgetter(slice(0))
"""Returns the empty tuple."""


def _make_label_reader(
    labels: tuple[str, ...], names: tuple[str, ...]
) -> Callable[[Values], Hashable]:
    """Return a function that selects the values of these labels from an event's values."""
    if not labels:
        return _NO_LABELS
    if "type" not in labels:
        return itemgetter(*map(names.index, labels))
    other, _ = labels
    at, item = names.index(other), names.index("item")
    return lambda values: (values[at], _ITEM_TYPES.get(values[item].type, "other"))


_ITEM_TYPES: Final = {SESSION: SESSION, HEALTHCHECK: HEALTHCHECK}


@dataclass(eq=False, repr=False)
class Metrics:
    """The metrics of one supervisor, on a registry that other supervisors may use too.

    Once open, `count` and `observe` may be called on any thread. Closing removes the gauges of the
    supervisor. Its counters stay, and late events are still counted.

    Attributes:
        snapshot: Returns the state for the gauges. Called on the thread of a scrape; quick.
        handlers: Handlers that have series at 0 from the start.
        clock: Returns monotonic seconds.
        now: Returns Unix time in seconds.
    """

    registry: CollectorRegistry
    environment_id: str
    _: KW_ONLY
    worker_id: str
    dialect: str
    version: str
    snapshot: Callable[[], PoolSnapshot]
    handlers: Iterable[str] = ()
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = _unix_time
    _series: dict[str, _MetricSeries] = field(init=False)
    _effects: dict[EventType, _EventMetricRules] = field(init=False)
    _acquire: Callable[[], object] = field(init=False)
    _release: Callable[[], None] = field(init=False)
    _source: GaugeValueSource = field(init=False)
    _shared: MetricsCollector | None = field(default=None, init=False)

    def open(self) -> None:
        """Register the metrics, with all known series at 0, and add the gauges.

        Raises:
            RegistryError: Open already, or the registry has another metric of one of the names.
        """
        if self._shared is not None:
            raise RegistryError("these metrics are open already")
        shared = collector_for_registry(self.registry)
        self._acquire, self._release = shared.stores_lock.acquire, shared.stores_lock.release
        self._source = GaugeValueSource(
            self.environment_id, self.worker_id, self.version, self.dialect, self.snapshot,
            RecentPollCounter(self.clock), self.now,
        )  # fmt: skip
        self._series = {
            row.name: _MetricSeries(
                shared.stores[row.name], row, self.environment_id, self._ensure_handler_label
            )
            for row in DEFINITIONS
            if row.name in shared.stores
        }
        self._effects = {event_type: _EventMetricRules(event_type) for event_type in _FIELDS}
        for row in DEFINITIONS:
            if row.event is not None:
                self._effects[row.event].add_metric(self._series[row.name], row)
        self.add_event_callback(ev.PollFinished, self._source.polls.count_poll)
        self.add_event_callback(ev.QueueStatsRead, self._store_queue_stats)
        self.add_event_callback(ev.SessionStarted, self._ensure_session_handler_label)
        for handler in self.handlers:
            self._ensure_handler_label(handler)
        shared.add_gauges(self._source)
        self._shared = shared

    def close(self) -> None:
        """Remove the gauges. Does nothing if the metrics are not open."""
        if self._shared is not None:
            self._shared.remove_gauges(self._source)
            self._shared = None

    def add_event_callback(self, event_type: EventType, callback: Callback) -> None:
        """Call `callback` with the values of each event of this type, after the event was counted.

        The callback runs on the thread that counts the event. The metrics must be open.
        """
        self._effects[event_type].callbacks.append(callback)

    def count(self, event_type: EventType, /, *values: Any) -> None:
        """Count one event, given as its type and the values of its fields in order."""
        try:
            effects = self._effects[event_type]
            labels = effects.labels_of(values)
            # Do not use `with` for the lock: it would cost 11,000 more CPU instructions an item.
            self._acquire()
            try:
                # Do not call `add` of counters and histograms: adding here saves 4 % of the CPU
                # instructions of a pool.
                counts, spreads, others = effects.targets.get(
                    labels
                ) or effects.find_series_of_event(labels, values)
                for count in counts:
                    count.value += 1
                for spread, at in spreads:
                    if (amount := values[at]) is not None:
                        spread.counts[bisect_left(spread.bounds, amount)] += 1
                        spread.total += amount
                for series, amount_at in others:
                    if (amount := 1 if amount_at is None else values[amount_at]) is not None:
                        series.add(amount)
            finally:
                self._release()
            for callback in effects.callbacks:
                callback(*values)
        except Exception:
            log.exception("metrics failed", extra={"event_type": str(event_type)})

    def observe(self, event: ev.Event) -> None:
        """Count one event object."""
        event_type = type(event)
        self.count(event_type, *(getattr(event, name) for name in _FIELDS[event_type]))

    def _store_queue_stats(self, stats: QueueStats) -> None:
        self._source.remote = (self.now(), stats)

    def _ensure_session_handler_label(self, _: object, handler: str) -> None:
        if handler not in self._source.handlers:
            self._ensure_handler_label(handler)

    def _ensure_handler_label(self, handler: str) -> str:
        """Create the series of a handler if they do not exist yet.

        Returns: The value of their label `handler`; handlers beyond `HANDLERS_MAX` share one.
        """
        label = self._source.handler_label(handler)
        if label not in self._source.handlers:
            if label == OTHER_HANDLERS:
                log.warning(
                    "more than %d handlers; the metrics show the others as one",
                    HANDLERS_MAX,
                    extra={"handler": OTHER_HANDLERS},
                )
            self._create_handler_series(label)
        return label

    def _create_handler_series(self, label: str) -> None:
        for series in self._series.values():
            if HANDLER in series.labels:
                series.create_series({HANDLER: label})
        self._source.handlers.add(label)
