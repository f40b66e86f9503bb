"""Notifications that wake waiting calls on all nodes, by LISTEN and NOTIFY.

A node announces a change after its commit: its own waiting calls wake at once, and those of other
nodes through one notification for all changes since the last. A notification can be lost, when a
node dies after a commit or is not connected, so each waiting call reads again after some seconds.
See workpool/docs/control-plane.md, "Wake-ups".
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from workpool.server.postgres.connection_pool import end_connection, open_connection
from workpool.server.postgres.database_errors import DRIVER_ERRORS, to_unavailable_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    Waiter: TypeAlias = asyncio.Future[bool]

log = logging.getLogger("workpool.server.postgres")

FALLBACK_SECONDS: Final = 5.0
"""Longest time until a change is seen whose notification was lost."""
CHANNEL: Final = "workpool"
EVERYTHING: Final = "*"
"""The topic of a notification that may be about any topic."""
_WORK: Final = "work:"
_PAYLOAD_MAX: Final = 7900
"""Bytes; PostgreSQL accepts fewer than 8000."""
_TOPICS_MAX: Final = 10_000
"""Number of topics with a record of their last change, and of those not yet sent."""
_BATCH_SECONDS: Final = 0.005
"""Shortest time between two notifications of one node: the first of many goes at once."""
_PING_SECONDS: Final = 10.0
_RECONNECT_SECONDS: Final = (0.1, 5.0)
"""Shortest and longest pause before another attempt to connect."""


def make_work_topic(environment_id: str) -> str:
    """Return the topic of an environment's claimable items. Each item wakes one waiting poll."""
    return _WORK + environment_id


def make_session_topic(session_id: str) -> str:
    """Return the topic of a session's events. A new event wakes all streams of the session."""
    return "session:" + session_id


class NotificationHub:
    """The waiting calls of one node. Each call waits for a change of one topic.

    A call gets the change count, reads the database, and then waits with that count, so that a
    change between the two ends the wait at once.

    Attributes:
        listening: Set while the node receives notifications.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._node = secrets.token_hex(8)
        self._waiting: dict[str, OrderedDict[Waiter, None]] = {}
        self._fallbacks: dict[str, asyncio.TimerHandle] = {}
        self._changes = 0
        # `_changes` is the number of changes so far. `_last` has the number of the last change of
        # each topic, in ascending order. If `_last` has too many topics, the topic with the lowest
        # number is removed, and `_forgotten` is set to this number. A topic that is not in `_last`
        # has therefore not changed since change number `_forgotten`.
        self._last: OrderedDict[str, int] = OrderedDict()
        self._forgotten = 0
        # For each topic, the number of new items that were announced while no poll was waiting.
        self._unused: dict[str, int] = {}
        self._unsent: dict[str, int] = {}
        self._wanted = asyncio.Event()  # set if a batch is to be sent or the connection is lost
        self._released = False
        self.listening = asyncio.Event()

    def get_change_count(self) -> int:
        """Return the number of changes this node knows. Call this before reading the database."""
        return self._changes

    async def wait_for_topic_change(self, topic: str, seen: int, seconds: float) -> bool:
        """Wait for a change of a topic after change number `seen`; return whether it was announced.

        False: `seconds` have passed, or a notification may be lost. A poll that then finds an item
        must call `wake_waiting_calls`, since only one poll is woken for any number of items.
        """
        if self._released or self._has_topic_changed(topic, seen):
            return True
        loop = asyncio.get_running_loop()
        waiter: Waiter = loop.create_future()
        self._add_waiting_call(topic, waiter)
        timer = loop.call_later(seconds, _set_wait_result, waiter, False)  # noqa: FBT003 - the result
        try:
            return await waiter
        except asyncio.CancelledError:
            # This poll was cancelled after a new item had woken it, so it does not claim the item:
            # wake another poll instead.
            if waiter.done() and not waiter.cancelled():
                self.wake_waiting_calls(topic)
            raise
        finally:
            timer.cancel()
            self._remove_waiting_call(topic, waiter)

    def announce_topic_changes(self, topic: str, count: int = 1) -> None:
        """Announce committed changes to this node at once, and to the other nodes soon."""
        self._record_topic_change(topic)
        self.wake_waiting_calls(topic, count)
        self._unsent[topic] = self._unsent.get(topic, 0) + count
        if len(self._unsent) > _TOPICS_MAX:
            self._unsent = {EVERYTHING: 1}
        self._wanted.set()

    def wake_waiting_calls(self, topic: str, count: int = 1) -> None:
        """Wake this node's waiting calls of a topic: `count` polls, or all streams of a session.

        If fewer than `count` polls wait, one poll that is reading the database reads it again for
        each missing waiting poll.
        """
        waiters: OrderedDict[Waiter, None] = self._waiting.get(topic, OrderedDict())
        is_work = topic.startswith(_WORK)
        count = count if is_work else len(waiters)
        while count > 0 and waiters:
            waiter, _ = waiters.popitem(last=False)
            count -= _set_wait_result(waiter, True)  # noqa: FBT003 - the result
        if is_work and count > 0:
            self._record_topic_change(topic)
            self._unused[topic] = self._unused.get(topic, 0) + count

    def end_waiting_calls(self) -> None:
        """End all waits because the node closes. From now on, no call waits."""
        self._released = True
        for timer in self._fallbacks.values():
            timer.cancel()
        self._fallbacks.clear()
        for topic in list(self._waiting):
            self.wake_waiting_calls(topic, len(self._waiting[topic]))

    async def run(self) -> None:
        """Exchange notifications with other nodes until cancelled; reconnect when disconnected."""
        shortest, longest = _RECONNECT_SECONDS
        pause = shortest
        while True:
            try:
                connection = await open_connection(self._url)
                try:
                    await self._listen(connection)
                    pause = shortest
                    await self._send_announcements(connection)
                finally:
                    self.listening.clear()
                    await end_connection(connection)
            except DRIVER_ERRORS as error:
                refusal = to_unavailable_error(error)
                if refusal is None:
                    raise
                log.warning("notifications interrupted: %s", refusal.reason)
            await asyncio.sleep(random.uniform(0.5, 1) * pause)  # noqa: S311 - no secret
            pause = min(2 * pause, longest)

    async def _listen(self, connection: Any) -> None:
        # PostgreSQL commits notifying transactions one at a time, so a wait for the disk in one of
        # them delays all others. Without that wait, a crash can lose a notification. The loss only
        # delays calls on other nodes by some seconds.
        await connection.execute("SET synchronous_commit = off")
        connection.add_termination_listener(lambda _: self._wanted.set())
        await connection.add_listener(CHANNEL, self._on_notification)
        self.listening.set()
        # This node has not received the notifications that were sent before it began to listen.
        self._wake_all_after_lost_notifications()

    async def _send_announcements(self, connection: Any) -> None:
        """Send announced changes until the connection is lost. Raises `DRIVER_ERRORS`.

        The changes announced while a batch is sent, and shortly after, form the next batch.
        """
        while True:
            try:
                async with asyncio.timeout(_PING_SECONDS):
                    await self._wanted.wait()
            except TimeoutError:
                # There is nothing to send. This statement fails if the connection is lost.
                await connection.execute("SELECT 1")
            self._wanted.clear()
            for payload, topics in list(self._make_notification_payloads()):
                await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)
                for topic, count in topics:
                    self._remove_sent_changes(topic, count)
                await asyncio.sleep(_BATCH_SECONDS)
            if connection.is_closed():
                raise ConnectionResetError

    def _make_notification_payloads(self) -> Iterator[tuple[str, list[tuple[str, int]]]]:
        """Iterate over pairs: a payload to send, and the topics and change counts in it."""
        lines = [self._node]
        topics: list[tuple[str, int]] = []
        length = len(self._node)
        for topic, count in self._unsent.items():
            line = f"{count} {topic}"
            length += len(line.encode()) + 1
            if length > _PAYLOAD_MAX and topics:
                yield "\n".join(lines), topics
                lines, topics = [self._node], []
                length = len(self._node) + len(line.encode()) + 1
            lines.append(line)
            topics.append((topic, count))
        if topics:
            yield "\n".join(lines), topics

    def _remove_sent_changes(self, topic: str, count: int) -> None:
        left = self._unsent.get(topic, 0) - count
        if left > 0:
            self._unsent[topic] = left  # changes that were announced while the batch was sent
        else:
            self._unsent.pop(topic, None)

    def _on_notification(self, _connection: object, _pid: int, _channel: str, payload: str) -> None:
        node, *lines = payload.split("\n")
        if node == self._node:
            return  # the notification came from this node, which has woken its calls already
        for line in lines:
            count, _, topic = line.partition(" ")
            if topic == EVERYTHING or not count.isdecimal():
                # The payload does not name the topics that have changed.
                self._wake_all_after_lost_notifications()
                return
            self._record_topic_change(topic)
            self.wake_waiting_calls(topic, int(count))

    def _wake_all_after_lost_notifications(self) -> None:
        """Wake one poll of each environment, and all streams: notifications may have been lost."""
        self._changes += 1
        self._last.clear()
        self._unused.clear()
        self._forgotten = self._changes
        for topic in list(self._waiting):
            self._make_waiting_calls_read_again(topic)

    def _has_topic_changed(self, topic: str, seen: int) -> bool:
        """Return whether `topic` changed after change number `seen`: a call must then read again.

        For each wake-up that found no waiting poll, only one of the polls that were reading reads
        again: otherwise each new item would make all of them read the database again.
        """
        changed = self._last.get(topic)
        if changed is None:
            return self._forgotten > seen
        if changed <= seen or not topic.startswith(_WORK):
            return changed > seen
        unused = self._unused.pop(topic, 0)
        if unused > 1:
            self._unused[topic] = unused - 1
        return unused > 0

    def _record_topic_change(self, topic: str) -> None:
        self._changes += 1
        self._last[topic] = self._changes
        self._last.move_to_end(topic)
        if len(self._last) > _TOPICS_MAX:
            _, self._forgotten = self._last.popitem(last=False)

    def _add_waiting_call(self, topic: str, waiter: Waiter) -> None:
        self._waiting.setdefault(topic, OrderedDict())[waiter] = None
        if topic not in self._fallbacks:
            self._fallbacks[topic] = asyncio.get_running_loop().call_later(
                FALLBACK_SECONDS, self._on_fallback_timer, topic
            )

    def _remove_waiting_call(self, topic: str, waiter: Waiter) -> None:
        waiters = self._waiting.get(topic)
        if waiters is None:
            return
        waiters.pop(waiter, None)
        if not waiters:
            del self._waiting[topic]

    def _on_fallback_timer(self, topic: str) -> None:
        del self._fallbacks[topic]
        waiters = self._waiting.get(topic)
        if waiters:
            self._fallbacks[topic] = asyncio.get_running_loop().call_later(
                FALLBACK_SECONDS, self._on_fallback_timer, topic
            )
            self._make_waiting_calls_read_again(topic)

    def _make_waiting_calls_read_again(self, topic: str) -> None:
        """Wake one poll, or all streams of a session, so that they read the database again."""
        waiters = self._waiting[topic]
        for waiter in list(waiters):
            del waiters[waiter]
            if _set_wait_result(waiter, False) and topic.startswith(_WORK):  # noqa: FBT003 - the result
                return


def _set_wait_result(waiter: Waiter, announced: bool) -> bool:  # noqa: FBT001 - the result
    """End a call's wait with a result; return False if the wait has ended already."""
    if waiter.done():
        return False
    waiter.set_result(announced)
    return True
