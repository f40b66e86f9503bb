"""A PostgreSQL server for the time of one benchmark, if PostgreSQL is installed."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.postgres.cluster import PostgresMissingError, remove_cluster, start_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.postgres.cluster import Cluster

# Sync commits to the disk, as in production. The PostgreSQL server for the tests does not.
SETTINGS = {
    "fsync": "on",
    "max_connections": "300",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
}


@contextmanager
def database_server() -> Iterator[Cluster | None]:
    """Run an empty PostgreSQL server. Without PostgreSQL, print a message and yield None."""
    try:
        cluster = start_cluster(SETTINGS)
    except PostgresMissingError as missing:
        print(f"left out: everything on PostgreSQL, which is {missing}", file=sys.stderr)
        yield None
        return
    try:
        yield cluster
    finally:
        remove_cluster(cluster)
