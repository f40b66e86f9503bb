"""The counting of events in the series that the table of metrics names.

An event is counted by its type and the values of its fields, in their order, so that no object is
created for it. Counting never raises: a label value that the table does not have is a bug of
workpool; it is a `RuntimeWarning`, which fails a test, and is not counted.
See workpool/docs/decisions.md, "Metrics are an observer" and
"Counters and histograms have stores of their own".
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from dataclasses import KW_ONLY, dataclass, field, fields
from datetime import UTC, datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from workpool import events as ev
from workpool.errors import RegistryError
from workpool.metrics.collectors import collectors_of
from workpool.metrics.definitions import (
    DEFINITIONS,
    ENVIRONMENT,
    HANDLER,
    HANDLERS_MAX,
    OTHER_HANDLERS,
)
from workpool.metrics.gauges import GaugeSource, NullWindow
from workpool.wire.protocol import HEALTHCHECK, SESSION

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from prometheus_client import CollectorRegistry

    from workpool.metrics.collectors import Collectors
    from workpool.metrics.definitions import Definition
    from workpool.metrics.gauges import PoolSnapshot
    from workpool.metrics.stores import Add, MetricStore
    from workpool.wire.items import QueueStats

    Values = tuple[Any, ...]
    """The values of an event's fields, in their order."""
    Callback = Callable[..., object]
    """A function of the values of an event's fields, in their order."""
    EventType = Callable[..., ev.Event]
    """A class of `Event`, as a function that returns an event."""

log = logging.getLogger(__name__)

_FIELDS: Final = {
    event_type: tuple(field.name for field in fields(event_type))
    for event_type in get_args(ev.Event)
}


def _unix_time() -> float:
    return datetime.now(UTC).timestamp()


def _leave_out(_: float) -> None:
    """Ignore an amount; used for a series that the metric does not have."""


class _Series(dict["Hashable", "Add"]):
    """The `add` functions of the series of one metric in one environment, by the other labels.

    The key is the value of the only other label, or the tuple of the values of several. A series
    with a run-time label is created at its first use, together with those for all closed values of
    the other labels, at 0: `rate()` misses the first increase of a series that begins at 1.
    """

    def __init__(
        self,
        store: MetricStore,
        row: Definition,
        environment_id: str,
        label_of: Callable[[str], str],
    ) -> None:
        super().__init__(dict.fromkeys(row.skips, _leave_out))
        self._label_of = label_of
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
        if HANDLER in given:
            return self._add_of_handler(given)
        self.prime(given)
        return self[key]

    def _add_of_handler(self, given: dict[str, Any]) -> Add:
        # The key of a further handler is not stored, since their number has no limit.
        given[HANDLER] = self._label_of(given[HANDLER])
        return self[tuple(given.values())]

    def prime(self, given: Mapping[str, Hashable]) -> None:
        """Create all series with the given values of the run-time labels."""
        choices = (self._row.labels[label] or (given[label],) for label in self.labels)
        for values in itertools.product(*choices):
            environment = (self._environment_id,) if ENVIRONMENT in self._row.labels else ()
            add = self._store.series((*environment, *map(str, values)))
            self[values[0] if len(values) == 1 else values] = add


class _Feed(NamedTuple):
    """The effect of an event on one metric.

    Attributes:
        key_of: Returns the key of the series, from the event's values.
        amount_at: The index of the amount in the event's values; None: the amount is 1.
    """

    series: _Series
    key_of: Callable[[Values], Hashable]
    amount_at: int | None


def _feed(series: _Series, row: Definition, event_type: type[ev.Event]) -> _Feed:
    names = _FIELDS[event_type]
    return _Feed(
        series,
        _key_reader(series.labels, names),
        None if row.value is None else names.index(row.value),
    )


def _key_reader(labels: tuple[str, ...], names: tuple[str, ...]) -> Callable[[Values], Hashable]:
    """Return a function that takes a key of `_Series` from the event's values."""
    if not labels:
        return itemgetter(slice(0))  # the empty tuple
    if "type" not in labels:
        return itemgetter(*map(names.index, labels))
    other, _ = labels
    at, item = names.index(other), names.index("item")
    return lambda values: (values[at], _item_type(values[item].type))


def _item_type(name: str) -> str:
    return name if name in {SESSION, HEALTHCHECK} else "other"


@dataclass(eq=False, repr=False)
class Metrics:
    """The metrics of one supervisor, on a registry that others may share.

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
    dialect: str
    version: str
    snapshot: Callable[[], PoolSnapshot]
    handlers: Iterable[str] = ()
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = _unix_time
    _series: dict[str, _Series] = field(init=False)
    _feeds: dict[EventType, list[_Feed]] = field(init=False)
    _callbacks: dict[EventType, list[Callback]] = field(init=False)
    _lock: threading.RLock = field(init=False)
    _source: GaugeSource = field(init=False)
    _shared: Collectors | None = field(default=None, init=False)

    def open(self) -> None:
        """Register the metrics, with all known series at 0, and add the gauges.

        Raises:
            RegistryError: Open already, or the registry has another metric of one of the names.
        """
        if self._shared is not None:
            raise RegistryError("these metrics are open already")
        shared = collectors_of(self.registry)
        self._lock = shared.stores_lock
        self._source = GaugeSource(
            self.environment_id, self.version, self.dialect, self.snapshot,
            NullWindow(self.clock), self.now,
        )  # fmt: skip
        self._series = {
            row.name: _Series(shared.stores[row.name], row, self.environment_id, self._label_of)
            for row in DEFINITIONS
            if row.name in shared.stores
        }
        self._feeds = self._feeds_by_type()
        self._callbacks = {
            ev.PollFinished: [self._on_poll],
            ev.QueueStatsRead: [self._on_stats],
            ev.SessionStarted: [self._on_start],
        }
        for handler in self.handlers:
            self._label_of(handler)
        shared.attach(self._source)
        self._shared = shared

    def close(self) -> None:
        """Remove the gauges. No effect if not open."""
        if self._shared is not None:
            self._shared.detach(self._source)
            self._shared = None

    def forward(self, event_type: EventType, callback: Callback) -> None:
        """Call `callback` with the values of each event of this type, after it was counted.

        The callback runs on the thread that counts the event. The metrics must be open.
        """
        self._callbacks.setdefault(event_type, []).append(callback)

    def count(self, event_type: EventType, /, *values: Any) -> None:
        """Count one event by the values of its fields, in their order."""
        try:
            with self._lock:
                for series, key_of, amount_at in self._feeds.get(event_type, ()):
                    amount = 1 if amount_at is None else values[amount_at]
                    if amount is not None:
                        series[key_of(values)](amount)
            for callback in self._callbacks.get(event_type, ()):
                callback(*values)
        except Exception:
            log.exception("metrics failed event_type=%s", event_type)

    def observe(self, event: ev.Event) -> None:
        """Count one event that exists as an object."""
        event_type = type(event)
        self.count(event_type, *(getattr(event, name) for name in _FIELDS[event_type]))

    def _feeds_by_type(self) -> dict[EventType, list[_Feed]]:
        feeds: dict[EventType, list[_Feed]] = {}
        for row in DEFINITIONS:
            if row.event is not None:
                feed = _feed(self._series[row.name], row, row.event)
                feeds.setdefault(row.event, []).append(feed)
        return feeds

    def _on_poll(self, result: ev.PollResult, _: float) -> None:
        if result in {"item", "null"}:
            self._source.polls.add(null=result == "null")

    def _on_stats(self, stats: QueueStats) -> None:
        self._source.remote = (self.now(), stats)

    def _on_start(self, _: object, handler: str) -> None:
        if handler not in self._source.handlers:
            self._label_of(handler)

    def _label_of(self, handler: str) -> str:
        """Return the label of a handler, which has gauges from its first session on."""
        label = self._source.label_of(handler)
        if label not in self._source.handlers:
            if label == OTHER_HANDLERS:
                log.warning(
                    "more than %d handlers; the metrics show the others as one handler=%s",
                    HANDLERS_MAX,
                    OTHER_HANDLERS,
                )
            self._show(label)
        return label

    def _show(self, label: str) -> None:
        for series in self._series.values():
            if HANDLER in series.labels:
                series.prime({HANDLER: label})
        self._source.handlers.add(label)
