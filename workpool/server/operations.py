"""The calls of the protocol on the state in memory; a store saves every change.

Synchronous except for the wait of a long poll, on one thread, with an injected clock. Each call
first ends the leases that are due, so no caller sees one. A caller awaits `wait_until_durable`
before it sends a result. See workpool/docs/protocol.md, "Calls" and "Sessions".
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workpool.server import state_machine
from workpool.server.answer_limits import NEW_METADATA_LIMIT_BYTES, check_metadata_limits
from workpool.server.api_errors import APIError, StoreError
from workpool.server.environments import ENVIRONMENT_PREFIX, ENVIRONMENTS_MAX, Environment
from workpool.server.history import History, Record, get_record_op_of_heartbeat
from workpool.server.pagination import ListPage, make_page
from workpool.server.parsing.session_script import parse_script
from workpool.server.queue.work_queue import WorkQueue
from workpool.server.retention import StoppedItemRetention
from workpool.server.sessions import SessionRegistry
from workpool.server.stored_item import WORK_PREFIX, IdGenerator, Item
from workpool.server.stores.store import MemoryStore
from workpool.server.timestamps import MILLISECOND, SECOND, make_system_clock
from workpool.wire.protocol import (
    ACTIVE,
    LIST_LIMIT_DEFAULT,
    QUEUED,
    SESSION,
    STARTING,
    STOPPED,
    STOPPING,
    TTL_DEFAULT_SECONDS,
    USER_MESSAGE,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from workpool.server.conversation import StoredEvent
    from workpool.server.history import Kind
    from workpool.server.parsing.creation_requests import NewSession
    from workpool.server.parsing.request_values import ItemFilter
    from workpool.server.queue.long_polls import Poll
    from workpool.server.queue.work_queue import WorkQueueStats
    from workpool.server.stored_session import StoredSession
    from workpool.server.stores.store import Store, StoreContents


LOOKED_AT_MAX = 10_000
"""Largest number of items that one page of a search reads, in some 5 ms."""


class Operations:
    """The calls of the protocol on any number of environments, in memory.

    Args:
        environments: Ids of the environments that are `self_hosted`.
        cloud_environments: Ids of other environments, whose work calls are all refused.
        store: The store of every change.
        now: Returns epoch seconds, which may stand still or go back.
        history_limit: The number of records to keep; None: all.
        retention: Seconds for which a stopped item is kept. A later call that creates or polls
            deletes the item with its session. None: forever.
    """

    def __init__(
        self,
        environments: Iterable[str],
        cloud_environments: Iterable[str] = (),
        *,
        store: Store | None = None,
        now: Callable[[], float] | None = None,
        history_limit: int | None = None,
        retention: float | None = None,
    ) -> None:
        self.history = History(history_limit)
        self._queues = {name: WorkQueue(name) for name in environments}
        self._cloud = frozenset(cloud_environments)
        self._environments: dict[str, Environment] = {}
        self._created_environments = 0
        self.signing_key = b""
        self._store = store or MemoryStore()
        self._clock = now or make_system_clock()
        self._latest = 0
        self._ids = IdGenerator()
        self.sessions = SessionRegistry(self._store, self._ids)
        self._retention = StoppedItemRetention(retention)
        self._closing = False

    async def open(self) -> None:
        """Open the store and read its content. Raises `StoreError`."""
        contents = await self._store.open()
        try:
            self._restore_store_contents(contents)
        except (APIError, LookupError, TypeError, ValueError) as error:
            raise StoreError(
                f"the rows of the store do not fit together: {error!r:.200}"
            ) from error

    def _restore_store_contents(self, contents: StoreContents) -> None:
        self.signing_key = contents.signing_key or secrets.token_bytes(32)
        kinds = (contents.items, contents.sessions, contents.events, contents.environments)
        ids = [row.id for rows in kinds for row in rows]
        self._ids = IdGenerator(max((name.partition("_")[2] for name in ids), default=""))
        contents, ended = self._retention.split_off_ended_sessions(contents, self._read_clock())
        self._store.delete_rows(ended)
        self.sessions.restore_sessions(contents, self._ids, self._latest)
        self._restore_environments(contents.environments)
        for item in contents.items:
            self._latest = max(self._latest, item.created_at, item.delivered_at or 0)
            if item.environment_id in self._queues:
                self._queues[item.environment_id].put_item(replace(item, delivered_at=None))
        for item in sorted(contents.items, key=lambda item: item.stopped_at or 0):
            self._retention.add_stopped_item(item)
        delivered = [item for item in contents.items if item.delivered_at is not None]
        for item in sorted(delivered, key=lambda item: item.delivered_at or 0):
            if item.environment_id in self._queues:
                self._queues[item.environment_id].put_item(item)

    def _restore_environments(self, created: Sequence[Environment]) -> None:
        for name in (*self._queues, *self._cloud):
            self._environments[name] = Environment(name, name, None, {}, self._latest)
        for environment in created:
            self._add_environment(environment)

    async def wait_until_durable(self) -> None:
        """Wait until all changes made before this call survive a crash. Raises `StoreError`."""
        await self._store.wait_until_durable()

    async def wait_for_failure(self) -> None:
        """Wait until the store can no longer save anything; then raise `StoreError`."""
        await self._store.wait_for_failure()

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()

    def end_waiting_calls(self) -> None:
        """End all waits of polls and streams, and forbid new waits, because the server closes."""
        self._closing = True
        self.sessions.end_waiting_calls()
        self.wake_all_polls()

    def wake_all_polls(self) -> None:
        """Wake all waiting polls, so that they notice that a test has moved the clock."""
        for queue in self._queues.values():
            queue.waiting.wake_polls(len(queue.waiting))

    @property
    def latest_call_time(self) -> int:
        """The time of the latest call in microseconds. No record of the history is newer."""
        return self._latest

    def get_queue(self, environment_id: str) -> WorkQueue:
        """End the expired leases of an environment, and return its queue.

        Raises a 404 if the environment is unknown, and a 400 if it is not `self_hosted`.
        """
        queue = self._queues.get(environment_id)
        if queue is None:
            if environment_id in self._cloud:
                raise APIError(400, "this environment is not self_hosted")
            raise APIError(404, "no such environment")
        self._end_due_leases(queue)
        return queue

    def get_environment(self, environment_id: str) -> Environment:
        """Return an environment; raises a 404 for an unknown id."""
        environment = self._environments.get(environment_id)
        if environment is None:
            raise APIError(404, "no such environment")
        return environment

    def environment_ids(self) -> list[str]:
        """Return the ids of all environments, ascending."""
        return sorted(self._environments)

    def create_environment(
        self, name: str, description: str | None, metadata: Mapping[str, str]
    ) -> Environment:
        """Create a `self_hosted` environment."""
        check_metadata_limits(metadata, NEW_METADATA_LIMIT_BYTES)
        if self._created_environments >= ENVIRONMENTS_MAX:
            raise APIError(400, f"there are {ENVIRONMENTS_MAX} environments already")
        now = self._read_clock()
        environment_id = ENVIRONMENT_PREFIX + self._ids.generate_id_digits(now)
        environment = Environment(environment_id, name, description, dict(metadata), now)
        self._add_environment(environment)
        self._store.save_environment(environment)
        return environment

    def _add_environment(self, environment: Environment) -> None:
        self._created_environments += 1
        self._environments.setdefault(environment.id, environment)
        self._queues.setdefault(environment.id, WorkQueue(environment.id))

    def enqueue(
        self,
        environment_id: str,
        *,
        count: int = 1,
        metadata: Mapping[str, str] | None = None,
        work_type: str = SESSION,
        session_id: str | None = None,
        script: object = None,
    ) -> tuple[Item, ...]:
        """Create items, each with a new session unless `session_id` names an existing one."""
        queue = self.get_queue(environment_id)
        self._delete_ended_sessions()
        now = self._latest
        metadata = dict(metadata or {})  # All items of this call share one copy of the metadata.
        check_metadata_limits(metadata, NEW_METADATA_LIMIT_BYTES)
        known = None if session_id is None else self.sessions.find_session(session_id)[0]
        parsed = None if script is None else parse_script(script, count)
        items = []
        for _ in range(count):
            with self._store.transaction():
                session = known or self.sessions.create_session(
                    environment_id, metadata, parsed, now
                )
                item = self._create_item(queue, session, metadata, work_type)
                self.sessions.attach_item_to_session(session, item.id, now)
            items.append(item)
        queue.waiting.wake_polls(count)
        return tuple(items)

    def create_session(self, wanted: NewSession) -> tuple[StoredSession, Item]:
        """Create a session, and queue its first work item."""
        queue = self.get_queue(wanted.environment_id)
        self._delete_ended_sessions()
        check_metadata_limits(wanted.metadata, NEW_METADATA_LIMIT_BYTES)
        now = self._latest
        with self._store.transaction():
            session = self.sessions.create_session(
                wanted.environment_id,
                wanted.metadata,
                wanted.script,
                now,
                title=wanted.title,
                agent=wanted.agent,
            )
            item = self._create_item(queue, session, wanted.metadata)
            self.sessions.attach_item_to_session(session, item.id, now, wanted.initial_events)
        queue.waiting.wake_polls(1)
        return session, item

    def _create_item(
        self,
        queue: WorkQueue,
        session: StoredSession,
        metadata: Mapping[str, str],
        work_type: str = SESSION,
    ) -> Item:
        item = Item(
            id=WORK_PREFIX + self._ids.generate_id_digits(self._latest),
            environment_id=queue.environment_id,
            session_id=session.id,
            type=work_type,
            metadata=metadata,
            created_at=self._latest,
        )
        return self._store_changed_item(queue, item, "created")

    def poll(self, environment_id: str, poll: Poll) -> Item | None:
        """Deliver an item to a poll without waiting; return None if there is no item."""
        queue = self.get_queue(environment_id)
        self._delete_ended_sessions()
        now = self._latest
        if poll.worker_id is not None:
            queue.record_poll(poll.worker_id, now)
        item = queue.find_oldest_claimable_item(now - poll.reclaim_older_than_ms * MILLISECOND)
        if item is None:
            return None
        delivered = state_machine.deliver_item(item, poll.worker_id, now)
        self._store_changed_item(queue, delivered, "delivered", poll.worker_id)
        queue.waiting.wake_polls_that_may_reclaim()
        return delivered

    async def long_poll(
        self, environment_id: str, poll: Poll, gone: Callable[[], bool]
    ) -> Item | None:
        """Deliver an item to a poll, which waits up to `block_ms`; return None if no item came.

        `gone` returns whether the client has disconnected. Then no item is delivered, and the next
        poll is woken instead of this poll.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + poll.block_ms / 1000
        while not gone():
            item = self.poll(environment_id, poll)
            remaining = deadline - loop.time()
            if item is not None or remaining <= 0 or self._closing:
                return item
            await self._wait_for_item(self.get_queue(environment_id), poll, remaining)
        self.get_queue(environment_id).waiting.wake_polls(1)
        return None

    async def _wait_for_item(self, queue: WorkQueue, poll: Poll, seconds: float) -> None:
        """Wait until the poll is woken, or an ended lease or old delivery frees an item."""
        reclaim = poll.reclaim_older_than_ms * MILLISECOND
        delivered = queue.deliveries.oldest_delivery_time()
        due = [instant for instant in (queue.leases.earliest_end(),) if instant is not None]
        if delivered is not None:
            due.append(delivered + reclaim)
        if due:
            seconds = min(seconds, (min(due) - self._latest) / SECOND)
        await queue.waiting.wait_until_woken(
            seconds, reclaiming=poll.reclaim_older_than_ms < poll.block_ms
        )

    def withdraw_delivery(self, item: Item) -> None:
        """Undo a delivery, because the client disconnected before it got the answer."""
        queue = self.get_queue(item.environment_id)
        if queue.is_current_item_version(item):
            self._store_changed_item(
                queue, state_machine.withdraw_delivery(item), "withdrawn", item.holder
            )
            queue.waiting.wake_polls(1)

    def ack_item(self, environment_id: str, work_id: str, worker_id: str | None = None) -> Item:
        """Acknowledge an item."""
        queue = self.get_queue(environment_id)
        item = queue.get_item(work_id)
        try:
            acked = state_machine.ack_item(item, worker_id, self._latest)
        except APIError:
            self._add_history_record("conflict", item, worker_id, op="ack")
            raise
        return self._store_changed_item(queue, acked, "acked", worker_id or acked.holder)

    def heartbeat(
        self,
        environment_id: str,
        work_id: str,
        expected: str | None = None,
        ttl_seconds: int = TTL_DEFAULT_SECONDS,
        worker_id: str | None = None,
        *,
        compare_on_stop: bool = True,
    ) -> Item:
        """Extend the lease of an item; `heartbeat_answer` turns the result into JSON."""
        queue = self.get_queue(environment_id)
        item = queue.get_item(work_id)
        try:
            beaten = state_machine.extend_lease(
                item, expected, ttl_seconds, self._latest, compare_on_stop=compare_on_stop
            )
        except APIError:
            self._add_history_record("conflict", item, worker_id, op="heartbeat")
            raise
        return self._store_changed_item(
            queue, beaten, "heartbeat", worker_id, op=get_record_op_of_heartbeat(expected)
        )

    def stop_item(
        self,
        environment_id: str,
        work_id: str,
        worker_id: str | None = None,
        *,
        force: bool = False,
        refused: frozenset[tuple[bool, str]] = frozenset(),
    ) -> Item:
        """Stop an item. Raises a 409 if the pair (`force`, the item's state) is in `refused`."""
        queue = self.get_queue(environment_id)
        item = queue.get_item(work_id)
        if (force, item.state) in refused:
            self._add_history_record("conflict", item, worker_id, op="stop")
            raise APIError(409, f"the item is {item.state}")
        stopped = state_machine.stop_item(item, self._latest, force=force)
        kind: Kind = "stop_requested" if stopped.state == STOPPING else "stopped"
        return self._store_changed_item(queue, stopped, kind, worker_id)

    def update_metadata(
        self,
        environment_id: str,
        work_id: str,
        patch: Mapping[str, str | None],
        worker_id: str | None = None,
    ) -> Item:
        """Merge a patch into an item's metadata."""
        queue = self.get_queue(environment_id)
        merged = state_machine.merge_metadata(queue.get_item(work_id), patch)
        check_metadata_limits(merged.metadata)
        return self._store_changed_item(queue, merged, "metadata", worker_id)

    def get_item(self, environment_id: str, work_id: str) -> Item:
        """Return an item; raises a 404 for an unknown id."""
        return self.get_queue(environment_id).get_item(work_id)

    def list_items(
        self,
        environment_id: str,
        limit: int = LIST_LIMIT_DEFAULT,
        *,
        after: str = "",
        before: str | None = None,
    ) -> ListPage[Item]:
        """Return a page of the items after or before the given id, in ascending order of ids."""
        items = self.get_queue(environment_id).list_items(limit + 1, after=after, before=before)
        return make_page(items, limit, backwards=before is not None)

    def search_items(
        self,
        environment_id: str,
        wanted: ItemFilter,
        limit: int = LIST_LIMIT_DEFAULT,
        *,
        after: str = "",
        before: str | None = None,
    ) -> ListPage[Item]:
        """Return a page of the items that match the filter `wanted`.

        A page reads `LOOKED_AT_MAX` items at most, so it may have fewer than `limit`, or none,
        although there are more.
        """
        walk = self.get_queue(environment_id).iterate_items(
            after=after, before=before, newest_first=wanted.newest_first
        )
        backwards = wanted.newest_first or before is not None
        found: list[Item] = []
        last: str | None = None
        for count, item in enumerate(walk):
            if len(found) == limit or count == LOOKED_AT_MAX:
                break  # the next page begins with this item
            last = item.id
            if wanted.matches(item):
                found.append(item)
        else:
            last = None
        if backwards and not wanted.newest_first:
            found.reverse()
        return ListPage(found, last is not None, backwards, last)

    def queue_stats(self, environment_id: str) -> WorkQueueStats:
        """Return the statistics of an environment's queue."""
        return self.get_queue(environment_id).compute_stats(self._latest)

    def get_session(self, session_id: str) -> tuple[StoredSession, Item]:
        """Return a session and the session's latest work item; raises a 404 for an unknown id."""
        session, work_id = self.sessions.find_session(session_id)
        return session, self.get_item(session.environment_id, work_id)

    def iterate_sessions(
        self, *, after: str = "", before: str | None = None, newest_first: bool = False
    ) -> Iterator[tuple[StoredSession, Item]]:
        """Iterate over sessions between the ids `after` and `before`, each with its latest item.

        Sessions of environments that are not served are left out.
        """
        walk = self.sessions.iterate_sessions(after=after, before=before, newest_first=newest_first)
        for session, work_id in walk:
            if session.environment_id in self._queues:
                yield session, self.get_item(session.environment_id, work_id)

    def archive_session(self, session_id: str) -> tuple[StoredSession, Item]:
        """Archive a session: terminate it, and request the stop of its work item."""
        session, item = self.get_session(session_id)
        if session.archived_at is None:
            with self._store.transaction():
                session = self.sessions.archive_session(session, self._latest)
                if item.state in {QUEUED, STARTING, ACTIVE}:
                    item = self.stop_item(session.environment_id, item.id)
        return session, item

    def send_events(
        self,
        session_id: str,
        new_events: Sequence[Mapping[str, Any]],
        *,
        messages_bring_work: bool = False,
    ) -> Sequence[StoredEvent]:
        """Append a client's events to a session: all of them, or none if one is refused.

        `messages_bring_work`: whether a message to a session whose item is stopped puts a new item
        into the queue.
        """
        session, item = self.get_session(session_id)
        has_message = any(event["type"] == USER_MESSAGE for event in new_events)
        with self._store.transaction():
            if messages_bring_work and has_message and item.state == STOPPED:
                # Check the events first, so that refused events create no item.
                self.sessions.get_conversation(session_id).validate_client_events(new_events)
                queue = self.get_queue(session.environment_id)
                self.sessions.attach_item_to_session(
                    session, self._create_item(queue, session, session.metadata).id, self._latest
                )
                queue.waiting.wake_polls(1)
            return self.sessions.send_events(session_id, new_events, self._latest)

    def emit_events(
        self, session_id: str, new_events: Sequence[Mapping[str, Any]]
    ) -> tuple[Mapping[str, Any], ...]:
        """Append events of the agent to a session, and return the stored events."""
        self.get_session(session_id)
        return tuple(
            event.value for event in self.sessions.emit_events(session_id, new_events, self._latest)
        )

    def _read_clock(self) -> int:
        """Return the clock's time, or the previously returned time if the clock has gone back."""
        self._latest = max(self._latest, int(self._clock() * SECOND))
        return self._latest

    def _end_due_leases(self, queue: WorkQueue) -> None:
        """End all expired leases, each as of the time at which it expired."""
        for work_id in queue.leases.pop_expired_leases(self._read_clock()):
            held = queue.get_item(work_id)
            self._store_changed_item(
                queue, state_machine.end_lease(held), "lapsed", held.holder, held.lease_end
            )

    def _store_changed_item(
        self,
        queue: WorkQueue,
        item: Item,
        kind: Kind,
        worker_id: str | None = None,
        at: int | None = None,
        op: str | None = None,
    ) -> Item:
        """Store a new version of an item and record the change, unless nothing changed."""
        if not queue.is_current_item_version(item):
            queue.put_item(item)
            self._store.save_item(item)
            self._add_history_record(kind, item, worker_id, at, op)
            if item.state == STOPPED and kind in {"stopped", "lapsed"}:
                self._retention.add_stopped_item(item)
        return item

    def _delete_ended_sessions(self) -> None:
        """Delete the sessions whose retention is over, with all items and events of each."""
        for session_id in self._retention.pop_due_sessions(self._latest):
            work_ids = self.sessions.item_ids(session_id)
            # The session was already deleted when the retention of another of its items was over.
            if not work_ids:
                continue
            queue = self._queues[self.sessions.find_session(session_id)[0].environment_id]
            items = queue.find_items_by_id(work_ids)
            # Keep the session if any of its items is not stopped, or was stopped too recently.
            if len(items) == len(work_ids) and self._retention.are_all_items_expired(
                items, self._latest
            ):
                for work_id in work_ids:
                    queue.remove_item(work_id)
                self._store.delete_rows([*items, *self.sessions.remove_session(session_id)])

    def _add_history_record(
        self,
        kind: Kind,
        item: Item,
        worker_id: str | None,
        at: int | None = None,
        op: str | None = None,
    ) -> None:
        time = (self._latest if at is None else at) / SECOND
        lease_end = None if item.lease_end is None else item.lease_end / SECOND
        self.history.add(Record(time, item.id, kind, worker_id, item.state, lease_end, op))
