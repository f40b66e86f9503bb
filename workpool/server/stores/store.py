"""Where items outlive the process, and the store that lets them not.

A store is only written to while the control plane runs: its working state is the index in memory
(`queue`), filled from the store at start. `save` never waits; an answer leaves after `durable`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.server.conversation import StoredEvent
    from workpool.server.environments import Environment
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import StoredSession
    from workpool.server.stores.sqlite_rows import Row


class Contents(NamedTuple):
    """The content of a store at start, in ascending order of ids.

    `signing_key`: what signs the items' session tokens; empty: the store keeps none.
    """

    items: Sequence[Item] = ()
    sessions: Sequence[StoredSession] = ()
    events: Sequence[StoredEvent] = ()
    environments: Sequence[Environment] = ()
    signing_key: bytes = b""


class Store(Protocol):
    """The interface of a store."""

    async def open(self) -> Contents:
        """Make ready and read everything. Raises `StoreError`."""

    def save(self, item: Item) -> None:
        """Take over an item's new self; returns at once."""

    def save_session(self, session: StoredSession) -> None:
        """Take over a session's new self; returns at once."""

    def save_environment(self, environment: Environment) -> None:
        """Take over a new environment; returns at once."""

    def save_events(self, events: Sequence[StoredEvent]) -> None:
        """Take over new events, all of which survive a crash or none; returns at once."""

    def delete(self, rows: Sequence[Row]) -> None:
        """Delete items, sessions and events; returns at once."""

    async def durable(self) -> None:
        """Return once all that was saved so far survives a crash. Raises `StoreError`."""

    async def failed(self) -> None:
        """Wait for the moment after which nothing can be saved anymore. Raises `StoreError`."""

    async def close(self) -> None:
        """Make the rest durable and let go of the file."""


class MemoryStore:
    """Nothing outlives the process."""

    async def open(self) -> Contents:
        """Start empty."""
        return Contents()

    def save(self, item: Item) -> None:
        """Nothing to do: the index holds it."""

    def save_session(self, session: StoredSession) -> None:
        """Nothing to do: the index holds it."""

    def save_environment(self, environment: Environment) -> None:
        """Nothing to do: the index holds it."""

    def save_events(self, events: Sequence[StoredEvent]) -> None:
        """Nothing to do: the index holds them."""

    def delete(self, rows: Sequence[Row]) -> None:
        """Nothing to do: the index held them."""

    async def durable(self) -> None:
        """Return at once."""

    async def failed(self) -> None:
        """Wait forever: there is nothing to fail."""
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Nothing to do."""
