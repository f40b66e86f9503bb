"""Tests that the PostgreSQL cluster for tests keeps committed data and separates databases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.postgres.cluster import Cluster


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_restarted_cluster_has_all_committed_rows(dedicated_postgres: Cluster, end: str) -> None:
    url = dedicated_postgres.create_database()
    dedicated_postgres.execute("CREATE TABLE number (value int)", url)
    dedicated_postgres.execute("INSERT INTO number VALUES (7)", url)
    endings: dict[str, Callable[[], None]] = {
        "stop": dedicated_postgres.stop,
        "kill": dedicated_postgres.kill_all_processes,
    }
    endings[end]()
    with pytest.raises(AssertionError, match="refused"):
        dedicated_postgres.execute("SELECT 1", url)
    dedicated_postgres.start()
    assert dedicated_postgres.execute("SELECT value FROM number", url) == "7"
    recovered = "not properly shut down" in dedicated_postgres.read_log()
    assert recovered == (end == "kill")


def test_database_created_for_test_is_empty(postgres: Cluster, database_url: str) -> None:
    other = postgres.create_database()
    postgres.execute("CREATE TABLE number (value int)", database_url)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert postgres.execute(tables, database_url) == "1"
    assert postgres.execute(tables, other) == "0"
