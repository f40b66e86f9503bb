"""The embedded control plane: both dialects of the work protocol over HTTP, on any of the stores.

    async with ControlPlane() as plane:
        plane.enqueue(count=40)
        ...  # workers at plane.base_url with plane.token

For tests, development and self-hosted queues: one process on one machine, or any number of them
on one PostgreSQL database. Shares only the protocol's words and constants with the worker.
See workpool/docs/protocol.md, "Protocol".
"""

from workpool.server.api_errors import APIError, ServeError, StoreError
from workpool.server.control_plane import DEFAULT_ENVIRONMENT, ControlPlane
from workpool.server.history import History, Record, Summary, summarize
from workpool.server.http.tokens import parse_token_file
from workpool.server.operations import Operations
from workpool.server.postgres.postgres_store import PostgresStore
from workpool.server.queue.long_polls import Poll
from workpool.server.stored_item import Item
from workpool.server.stores.sqlite import SqliteStore
from workpool.server.stores.store import MemoryStore, Store

__all__ = [
    "DEFAULT_ENVIRONMENT",
    "APIError",
    "ControlPlane",
    "History",
    "Item",
    "MemoryStore",
    "Operations",
    "Poll",
    "PostgresStore",
    "Record",
    "ServeError",
    "SqliteStore",
    "Store",
    "StoreError",
    "Summary",
    "parse_token_file",
    "summarize",
]
