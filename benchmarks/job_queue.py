"""The PostgreSQL job queue `procrastinate` with no-op jobs, to compare control planes with it.

It has no servers: its workers talk to the database, with its own connector and as many jobs at once
as a pool has slots. Finished jobs stay in its table, as stopped items do in a control plane.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import uvloop
from benchmark_runs import LIMIT_SECONDS
from compared_programs import CONCURRENCY
from system_measurements import MeasuredSystem, count_stopped_item

from workpool.wire.protocol import ENQUEUE_COUNT_MAX

try:
    import procrastinate
    import psycopg
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from system_measurements import Stops

    from tests.postgres.cluster import Cluster

TASK = "nothing"
_UNDER_WAY = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
_FINISHED = """
    INSERT INTO procrastinate_jobs (queue_name, task_name, status, attempts)
    SELECT 'default', %s, 'succeeded', 1 FROM generate_series(1, %s)
"""


@contextmanager
def open_job_queue(server: Cluster, finished: int) -> Iterator[MeasuredSystem]:
    """Create a job queue in a new database, with `finished` jobs that have ended."""
    url = server.create_database()
    asyncio.run(_create_queue(url, finished))
    yield MeasuredSystem(
        enqueue=lambda number: asyncio.run(_enqueue_jobs(url, number)),
        worker=lambda _: partial(_run_worker, url),
        database=server.pid,
        settled=partial(_wait_until_jobs_finished, url),
    )


def _create_procrastinate_app(url: str) -> procrastinate.App:
    connector = procrastinate.PsycopgConnector(conninfo=url, max_size=CONCURRENCY)
    return procrastinate.App(connector=connector)


async def _create_queue(url: str, finished: int) -> None:
    app = _create_procrastinate_app(url)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        # This setting disables triggers, so that the insert is fast. Unlike real jobs, these jobs
        # have no rows in the table of events.
        await connection.execute("SET session_replication_role = replica")
        await connection.execute(_FINISHED, (TASK, finished))
        await connection.execute("VACUUM ANALYZE procrastinate_jobs")


async def _enqueue_jobs(url: str, number: int) -> None:
    app = _create_procrastinate_app(url)
    task = app.configure_task(TASK)
    async with app.open_async():
        for start in range(0, number, ENQUEUE_COUNT_MAX):
            await task.batch_defer_async(*[{}] * min(ENQUEUE_COUNT_MAX, number - start))


def _wait_until_jobs_finished(url: str) -> None:
    """Wait until the database marks all jobs as finished.

    The function of a job counts the job before that, so the counter alone shows the end too early.
    """
    until = time.monotonic() + LIMIT_SECONDS
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < until:
            row = connection.execute(_UNDER_WAY).fetchone()
            if row is not None and row[0] == 0:
                return
    raise TimeoutError("jobs are under way")


def _run_worker(url: str, pipe: Connection, stops: Stops) -> None:
    app = _create_procrastinate_app(url)

    async def run_no_op_job() -> None:
        count_stopped_item(stops)

    # Do not use `app.task` as a decorator. Without procrastinate, mypy would not know the type of
    # the decorator.
    app.task(name=TASK)(run_no_op_job)

    async def run_job_worker() -> None:
        async with app.open_async():
            pipe.send(os.getpid())
            await app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False)

    uvloop.run(run_job_worker())
