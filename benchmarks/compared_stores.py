"""The stores that benchmarks compare, each with the number of control planes that serve it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from system_measurements import MEMORY, serve_control_planes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backlog_setup import Backlog
    from benchmark_runs import ComparedProgram
    from system_measurements import MeasuredSystem

    from tests.postgres.cluster import Cluster

COLUMNS = ("store", "nodes")


@dataclass(frozen=True)
class ComparedStore:
    """A kind of store, with its name on the command line and the number of its control planes."""

    name: str
    kind: str
    nodes: int = 1
    on_database: bool = False

    @property
    def first_cells_of_table_row(self) -> list[str]:
        """The first cells of a table row: the kind of store and the number of nodes."""
        return [self.kind, str(self.nodes)]

    @contextmanager
    def open_store(
        self, program: ComparedProgram, backlog: Backlog, server: Cluster | None
    ) -> Iterator[MeasuredSystem]:
        """Start control planes on a new store with a backlog.

        A store in PostgreSQL is a new database of `server`.
        """
        with ExitStack() as stack:
            if self.on_database:
                assert server is not None
                place = server.create_database()
            elif self.kind == MEMORY:
                place = MEMORY
            else:
                place = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "items.db")
            planes = serve_control_planes(
                place,
                program,
                backlog=backlog,
                nodes=self.nodes,
                database=server.pid if self.on_database and server is not None else None,
            )
            yield stack.enter_context(planes)


COMPARED_STORES = {
    store.name: store
    for store in (
        ComparedStore("memory", MEMORY),
        ComparedStore("sqlite", "SQLite"),
        ComparedStore("postgres-1", "PostgreSQL", 1, on_database=True),
        ComparedStore("postgres-2", "PostgreSQL", 2, on_database=True),
        ComparedStore("postgres-4", "PostgreSQL", 4, on_database=True),
    )
}
