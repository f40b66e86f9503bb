"""The stores that benchmarks serve, each with its number of control plane processes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleet import MEMORY, control_planes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arena import Contender
    from backlogs import Backlog
    from fleet import System

    from tests.postgres.cluster import Cluster

COLUMNS = ("store", "nodes")


@dataclass(frozen=True)
class ServedStore:
    """A kind of store, with its name on the command line and in tables."""

    name: str
    kind: str
    nodes: int = 1
    on_database: bool = False

    @property
    def cells(self) -> list[str]:
        """The first cells of a row."""
        return [self.kind, str(self.nodes)]

    @contextmanager
    def opened(
        self, contender: Contender, backlog: Backlog, server: Cluster | None
    ) -> Iterator[System]:
        """Serve a new store with this backlog; `server`: where new databases are created."""
        with ExitStack() as stack:
            if self.on_database:
                assert server is not None
                place = server.create_database()
            elif self.kind == MEMORY:
                place = MEMORY
            else:
                place = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "items.db")
            planes = control_planes(
                place,
                contender,
                backlog=backlog,
                nodes=self.nodes,
                database=server.pid if self.on_database and server is not None else None,
            )
            yield stack.enter_context(planes)


SERVED = {
    store.name: store
    for store in (
        ServedStore("memory", MEMORY),
        ServedStore("sqlite", "SQLite"),
        ServedStore("postgres-1", "PostgreSQL", 1, on_database=True),
        ServedStore("postgres-2", "PostgreSQL", 2, on_database=True),
        ServedStore("postgres-4", "PostgreSQL", 4, on_database=True),
    )
}
