"""The fixture `workpool`: a control plane, pools on it, and the results of their sessions.

    async def test_counts_the_rows(workpool: Kit) -> None:
        result = await workpool.run_session(count_rows, metadata={"table": "orders"})
        assert (result.outcome, result.metadata["rows"]) == ("completed", "42")

Under `@in_virtual_time` the same calls run on a clock that jumps, without a network. Every wait is
bounded, and a failed wait reports what happened instead. See workpool/docs/testing.md,
"Testing handlers".
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from workpool.events import DrainFinished, ItemDeclined, SessionFinished
from workpool.handlers import callable_name, find_handler_rule
from workpool.pool.supervisor import Supervisor
from workpool.server import ControlPlane
from workpool.settings import Settings
from workpool.testing.bounded_wait import VIRTUAL_WAIT_SECONDS, WAIT_SECONDS
from workpool.testing.event_recorder import Recorder
from workpool.testing.fault import expire_lease
from workpool.testing.fault_rules import Faults
from workpool.testing.local_client import LocalClient
from workpool.testing.loop_supervisor import ThreadlessSupervisor
from workpool.testing.virtual_time import VirtualLoop
from workpool.testing.wait_failure import count_event_names, describe_item_progress
from workpool.wire.protocol import STOPPED

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from contextlib import AsyncExitStack
    from types import TracebackType
    from typing import Self

    from workpool.pool.pool_context import PoolContext
    from workpool.server import Item
    from workpool.session import Outcome

E = TypeVar("E")
T = TypeVar("T")

VIRTUAL_START: Final = 1_772_366_400.0
"""The time of the control plane at the beginning of virtual time: 2026-03-01T12:00:00Z."""
ITEMS_SHOWN: Final = 5
"""Items that a report of a failed wait describes."""


@dataclass(frozen=True, slots=True)
class SessionResult:
    """The result of one session of a test.

    Attributes:
        outcome: The outcome in the pool.
        metadata: The metadata of the item at the end.
        events: The events of the session, oldest first.
        error: The exception of the handler, if any.
        seconds: The time from the acknowledgement to the end; virtual seconds in virtual time.
        item: The item at the control plane. `state` is `stopped` unless it is delivered again.
    """

    outcome: Outcome
    metadata: Mapping[str, str]
    events: Sequence[Mapping[str, Any]]
    error: BaseException | None
    seconds: float
    item: Item


class Kit:
    """The control plane of one test, and the pools that the test runs on it.

    Attributes:
        recorder: All events of the pools.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._pools: list[_HeartbeatOnDemandPool] = []
        self._items: list[Item] = []
        self._returned: set[int] = set()

    @functools.cached_property
    def server(self) -> ControlPlane:
        """The control plane of the test. In virtual time it has no port, else a free one."""
        __tracebackhide__ = True
        loop = _virtual_loop()
        if loop is None:
            return ControlPlane(middlewares=[self.faults.middleware])
        return ControlPlane(now=lambda: VIRTUAL_START + loop.machine_time())

    @functools.cached_property
    def faults(self) -> Faults:
        """The faults to inject into calls to the control plane, and a log of all calls."""
        __tracebackhide__ = True
        return Faults(over_http=_virtual_loop() is None)

    def enqueue(
        self,
        count: int = 1,
        metadata: Mapping[str, str] | None = None,
        **given: Any,
    ) -> tuple[Item, ...]:
        """Create work items, with the keywords of `ControlPlane.enqueue`."""
        items = self.server.enqueue(count, metadata, **given)
        self._items += items
        return items

    def item(self, item: Item) -> Item:
        """Return the current state of an item at the control plane."""
        return self.server.operations.get_item(item.environment_id, item.id)

    def stop(self, item: Item, *, force: bool = False) -> None:
        """Stop an item, as an operator does.

        The item's pool sends a heartbeat at once, so that its session receives the stop request
        without delay.
        """
        self.server.operations.stop_item(item.environment_id, item.id, force=force)
        self._send_heartbeat_now(item)

    def lose(self, item: Item) -> None:
        """End an item's lease, as an outage does.

        The item's pool sends a heartbeat at once, so that it detects the loss without delay.
        The session ends as `lease_lost`. The item is in the queue again, so a pool of this test
        receives it again.

        Raises:
            ValueError: No worker holds a lease of the item.
        """
        now = self.item(item)
        if now.lease_end is None:
            raise ValueError(f"no worker holds a lease of {item.id}: it is {now.state}")
        expire_lease(self.server, item.id, item.environment_id)
        self._send_heartbeat_now(item)

    def settings(self, **values: Any) -> Settings:
        """Return settings for a pool on the test's control plane; `values` override defaults."""
        plane = self.server
        ours: dict[str, Any] = {
            "base_url": plane.base_url,
            "environment_id": plane.environments[0],
            "token": plane.token,
            "stats_interval": 0,
        }
        return Settings(**ours | values)

    def pool(self, *plugins: object, **settings: Any) -> Supervisor:
        """Return a pool with the given plugins on the test's control plane.

        Run the pool with `async with`, like any `Supervisor`.

        Raises:
            RuntimeError: The control plane is not open: outside of the fixture, `async with Kit()`.
        """
        plugins = (*plugins, self.recorder)
        if _virtual_loop() is None:
            if self.server.port == 0:
                raise RuntimeError("the control plane is not open; use `async with Kit()`")
            pool = _HeartbeatOnDemandPool(self.settings(**settings), plugins=plugins)
        else:
            faults = self.faults
            connect = functools.partial(
                LocalClient,
                self.server.operations,
                faults=faults.fault_for_call,
                on_answer=faults.record_answer_status,
            )
            pool = _VirtualTimePool(self.settings(**settings), plugins=plugins, connect=connect)
        self._pools.append(pool)
        return pool

    async def run_session(
        self,
        *plugins: object,
        metadata: Mapping[str, str] | None = None,
        script: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> SessionResult:
        """Enqueue one item, and run a pool with the given plugins until its session has ended.

        Args:
            plugins: A handler, or any other plugins that `Supervisor` accepts.
            metadata: The metadata of the item.
            script: The tool uses of a scripted session; None: a session without events.
            timeout: Seconds to wait. None: 30 s, or a day of virtual time.
            settings: Settings of the pool, by name.

        Raises:
            AssertionError: The session has not ended, or no handler takes the item.
            WorkpoolError: The pool cannot start, or failed.
        """
        __tracebackhide__ = True
        (item,) = self.enqueue(metadata=metadata, script=script)

        def is_end_of_session(event: object) -> bool:
            match event:
                case SessionFinished(session=session):
                    return session.item.id == item.id
                case ItemDeclined(item=declined, reason=reason):
                    return declined.id == item.id and reason != "busy"
            # Without this condition, the wait would last until the timeout if this pool drains or
            # fails. A drain of another pool of the test must not end the wait.
            return isinstance(event, DrainFinished) and pool.status().draining

        # With more slots, the pool could take other items of the test.
        one_at_a_time: dict[str, Any] = {"concurrency": 1}
        pool = self.pool(*plugins, **one_at_a_time | settings)
        async with pool:
            try:
                end = await self.recorder.wait_for(
                    object, is_end_of_session, timeout=_timeout_seconds(timeout)
                )
            except AssertionError:
                raise AssertionError(self._describe_session_failure(item, timeout)) from None
        match end:
            case SessionFinished():
                return self._make_session_result(end, self.item(item))
            case ItemDeclined():
                raise AssertionError(_explain_decline_of_item(end, plugins))
        raise AssertionError("the pool was drained before the session had ended")

    async def wait_for(
        self,
        kind: type[E],
        where: Callable[[E], bool] | None = None,
        *,
        count: int | None = None,
        timeout: float | None = None,
    ) -> E:
        """Return an event of the class `kind`, and wait for it if it has not happened yet.

        Args:
            kind: A class of `workpool.events`.
            where: Only events that this accepts.
            count: The number of the event since the test began; None: the first event that no
                earlier call without `count` has returned.
            timeout: Seconds to wait. None: 30 s, or a day of virtual time.

        Raises:
            AssertionError: There was no such event in time. The text reports what happened to the
                items instead, and where their handlers wait.
        """
        __tracebackhide__ = True

        def is_new_event(event: E) -> bool:
            return id(event) not in self._returned and (where is None or where(event))

        accepts = is_new_event if count is None else where
        seconds = _timeout_seconds(timeout)
        try:
            event = await self.recorder.wait_for(kind, accepts, count=count or 1, timeout=seconds)
        except AssertionError:
            wanted = f"{'another' if count is None else f'{count} ×'} {kind.__name__}"
            raise AssertionError(self._describe_wait_failure(wanted, seconds)) from None
        if count is None:
            # `id(event)` is unique: the recorder keeps all events alive, so Python reuses no id.
            self._returned.add(id(event))
        return event

    async def __aenter__(self) -> Self:
        """Open the port of the control plane, except in virtual time, where it needs no port."""
        if _virtual_loop() is None:
            await self.server.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the port of the control plane, except in virtual time, where it has no port."""
        if _virtual_loop() is None:
            await self.server.__aexit__(kind, error, trace)

    def around(self, test: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Any]:
        """Return a wrapper that opens the control plane, calls `test`, and closes it again."""

        @functools.wraps(test)
        async def run_with_control_plane(*args: Any, **kwargs: Any) -> T:
            async with self:
                return await test(*args, **kwargs)

        return run_with_control_plane

    def _describe_session_failure(self, item: Item, timeout: float | None) -> str:
        lines = [f"the session has not ended within {_timeout_seconds(timeout):g} s"]
        lines += describe_item_progress(self.item(item), self.server)
        return "\n".join([*lines, f"the pool reported: {count_event_names(self.recorder.events)}"])

    def _send_heartbeat_now(self, item: Item) -> None:
        """Make the pool that has the item's lease send a heartbeat now."""
        for pool in self._pools:
            pool.send_item_heartbeat(item.id)

    def _describe_wait_failure(self, wanted: str, seconds: float) -> str:
        """Return the error text of a failed wait: the events, and the states of open items."""
        reported = count_event_names(self.recorder.events)
        lines = [f"not within {seconds:g} s: {wanted}; the pool reported: {reported}"]
        unfinished = [now for each in self._items if (now := self.item(each)).state != STOPPED]
        for item in unfinished[:ITEMS_SHOWN]:
            lines += [f"{item.id}:", *describe_item_progress(item, self.server)]
        return "\n".join(lines)

    def _make_session_result(self, finished: SessionFinished, item: Item) -> SessionResult:
        return SessionResult(
            outcome=finished.outcome,
            metadata=dict(item.metadata),
            events=self.server.events(item.session_id),
            error=finished.error,
            seconds=finished.seconds,
            item=item,
        )


class _HeartbeatOnDemandPool(Supervisor):
    """A pool with a method that sends an item's heartbeat at once."""

    _context: PoolContext | None = None

    async def _open_pool_context(self, stack: AsyncExitStack) -> PoolContext:
        self._context = await super()._open_pool_context(stack)
        return self._context

    def send_item_heartbeat(self, work_id: str) -> None:
        """Send a heartbeat for the item now, if this pool has the item's lease."""
        if self._context is not None:
            for lease in self._context.renewer.held_leases():
                if lease.item.id == work_id:
                    self._context.renewer.request_heartbeat(lease)


class _VirtualTimePool(_HeartbeatOnDemandPool, ThreadlessSupervisor):
    """A pool in virtual time with a method that sends an item's heartbeat at once."""


def _virtual_loop() -> VirtualLoop | None:
    __tracebackhide__ = True
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError("the fixture `workpool` is for tests that are `async def`") from None
    return loop if isinstance(loop, VirtualLoop) else None


def _timeout_seconds(timeout: float | None) -> float:
    if timeout is not None:
        return timeout
    return WAIT_SECONDS if _virtual_loop() is None else VIRTUAL_WAIT_SECONDS


def _explain_decline_of_item(event: ItemDeclined, plugins: Sequence[object]) -> str:
    rules = [
        f"{callable_name(each)} takes {rule}"
        for each in plugins
        if (rule := find_handler_rule(each))
    ]
    had = " ".join(f"{key}={value}" for key, value in event.item.metadata.items())
    return "\n".join(
        [f"the item was declined as {event.reason}; it has: {had or 'no metadata'}", *rules]
    )
