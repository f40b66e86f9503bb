"""The interface of a store, and a store in memory.

While the control plane runs, it only writes to the store: its working state is the index in memory
(`queue`), which is filled from the store at start. `save_item` never waits; an answer is sent after
`wait_until_durable`.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from workpool.server.conversation import StoredEvent
    from workpool.server.environments import Environment
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import StoredSession
    from workpool.server.stores.sqlite_rows import Row


class StoreContents(NamedTuple):
    """The content of a store at start, in ascending order of ids.

    `signing_key`: the key that signs the items' session tokens; empty: the store has none.
    """

    items: Sequence[Item] = ()
    sessions: Sequence[StoredSession] = ()
    events: Sequence[StoredEvent] = ()
    environments: Sequence[Environment] = ()
    signing_key: bytes = b""


class Store(Protocol):
    """The interface of a store, to which the control plane writes each change."""

    async def open(self) -> StoreContents:
        """Open the store and read its contents. Raises `StoreError`."""

    def transaction(self) -> AbstractContextManager[object]:
        """Return a context that saves all changes of its block or none; the block never awaits."""

    def save_item(self, item: Item) -> None:
        """Schedule the saving of a new version of an item; returns at once."""

    def save_session(self, session: StoredSession) -> None:
        """Schedule the saving of a new version of a session; returns at once."""

    def save_environment(self, environment: Environment) -> None:
        """Schedule the saving of a new environment; returns at once."""

    def save_events(self, events: Sequence[StoredEvent]) -> None:
        """Schedule the saving of new events, all of them or none; returns at once."""

    def delete_rows(self, rows: Sequence[Row]) -> None:
        """Schedule the deletion of items, sessions and events; returns at once."""

    async def wait_until_durable(self) -> None:
        """Wait until all changes made before this call survive a crash. Raises `StoreError`."""

    async def wait_for_failure(self) -> None:
        """Wait until the store fails permanently; then raise `StoreError`."""

    async def close(self) -> None:
        """Save the remaining changes and close the store."""


class MemoryStore:
    """A store that saves nothing: its content is lost when the process ends."""

    async def open(self) -> StoreContents:
        """Return `StoreContents` without rows, because this store saves nothing."""
        return StoreContents()

    def transaction(self) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()

    def save_item(self, item: Item) -> None:
        """Do nothing: the control plane has the item in memory."""

    def save_session(self, session: StoredSession) -> None:
        """Do nothing: the control plane has the session in memory."""

    def save_environment(self, environment: Environment) -> None:
        """Do nothing: the control plane has the environment in memory."""

    def save_events(self, events: Sequence[StoredEvent]) -> None:
        """Do nothing: the control plane has the events in memory."""

    def delete_rows(self, rows: Sequence[Row]) -> None:
        """Do nothing, because nothing was saved."""

    async def wait_until_durable(self) -> None:
        """Return at once, because no change ever becomes durable."""

    async def wait_for_failure(self) -> None:
        """Wait forever, since nothing can fail."""
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Do nothing, since nothing is open."""
