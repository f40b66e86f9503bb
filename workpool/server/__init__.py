"""The embedded control plane: both dialects of the work protocol over HTTP, from memory or SQLite.

    async with ControlPlane() as plane:
        plane.enqueue(count=40)
        ...  # workers at plane.base_url with plane.token

Shares only the protocol's words and constants with the worker.
See workpool/docs/protocol.md, "Protocol".
"""

from workpool.server.app import DEFAULT_ENVIRONMENT, ControlPlane
from workpool.server.errors import Refusal, ServeError, StoreError
from workpool.server.history import History, Record, Summary, summarize
from workpool.server.item import Item
from workpool.server.operations import Operations, Poll
from workpool.server.sqlite import SqliteStore
from workpool.server.store import MemoryStore, Store
from workpool.server.tokens import parse_token_file

__all__ = [
    "DEFAULT_ENVIRONMENT",
    "ControlPlane",
    "History",
    "Item",
    "MemoryStore",
    "Operations",
    "Poll",
    "Record",
    "Refusal",
    "ServeError",
    "SqliteStore",
    "Store",
    "StoreError",
    "Summary",
    "parse_token_file",
    "summarize",
]
