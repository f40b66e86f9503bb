"""The documented promises: four requests per item, and no lost item after a SIGKILL."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.acceptance.conftest import ENVIRONMENT, TOKEN
from workpool.server import ControlPlane
from workpool.testing import Clock, Faults

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.conftest import CommandStarter, RunningCommand

pytestmark = [pytest.mark.acceptance, pytest.mark.trial, pytest.mark.timeout(120)]

ITEMS = 1000
HELD = 8
LEASE_SECONDS = 10
SECONDS = 60.0
UNFINISHED_MAX = 50
HANDLER = """
import asyncio
from pathlib import Path
from workpool import Session, handler

@handler
async def work(session: Session) -> None:
    with Path("runs").open("a") as runs:
        runs.write(session.item.id + "\\n")
    if session.item.metadata.get("do") == "hold" and not session.redelivered:
        await asyncio.Event().wait()
"""
ORDER = ["queued", "starting", "active", "stopping", "stopped"]


@pytest.fixture
def handlers_directory(command_working_directory: Path) -> Path:
    """Return the workers' current directory, where handlers record the items that they ran."""
    (command_working_directory / "works.py").write_text(HANDLER)
    return command_working_directory


async def start_worker(
    bare: CommandStarter, base_url: str, *flags: str, **variables: str
) -> RunningCommand:
    defaults = {
        "WORKPOOL_BASE_URL": base_url,
        "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
        "WORKPOOL_TOKEN": TOKEN,
        "WORKPOOL_METRICS_LISTEN": "off",
        "WORKPOOL_STATS_INTERVAL": "0",
        "WORKPOOL_LEASE_TTL": str(LEASE_SECONDS),
        "WORKPOOL_CONCURRENCY": str(HELD),
    }
    return await bare("run", "works", *flags, **{**defaults, **variables})


def count_handler_runs_per_item(folder: Path) -> Counter[str]:
    return Counter((folder / "runs").read_text().split())


async def test_worker_sends_four_requests_for_each_of_thousand_items(
    start_command_without_settings: CommandStarter, handlers_directory: Path
) -> None:
    faults = Faults()
    async with ControlPlane(
        environments=(ENVIRONMENT,), tokens={TOKEN: None}, middlewares=[faults.middleware]
    ) as plane:
        items = plane.enqueue(count=ITEMS)
        # With a short lease or reclaim window, a slow machine would need a second heartbeat or a
        # second delivery for an item.
        patient = {"WORKPOOL_LEASE_TTL": "600", "WORKPOOL_RECLAIM_OLDER_THAN_MS": "600000"}
        command = await start_worker(
            start_command_without_settings, plane.base_url, "--drain", **patient
        )
        assert await command.wait_for_exit(SECONDS) == 0
    assert plane.summary() == (ITEMS, ITEMS, 0, 0, 0)
    assert count_handler_runs_per_item(handlers_directory) == Counter(
        {item.id: 1 for item in items}
    )
    sent = Counter(request.op for request in faults.seen)
    empty = sent.pop("poll") - ITEMS
    assert sent == {"ack": ITEMS, "heartbeat": ITEMS, "stop": ITEMS}
    # At least one poll found no item, because such a poll ends a worker with `--drain`.
    assert empty >= 1
    for item in items:
        kinds = [record.kind for record in plane.history.records_of_item(item.id)]
        assert kinds == ["created", "delivered", "acked", "heartbeat", "stopped"]


@pytest.mark.usefixtures("handlers_directory")
async def test_items_of_killed_worker_are_finished_by_another_worker(
    start_command_without_settings: CommandStarter,
) -> None:
    faults, clock = Faults(), Clock()
    async with ControlPlane(
        environments=(ENVIRONMENT,),
        tokens={TOKEN: None},
        now=clock,
        middlewares=[faults.middleware],
    ) as plane:
        items = plane.enqueue(count=HELD, metadata={"do": "hold"})
        victim = await start_worker(
            start_command_without_settings, plane.base_url, WORKPOOL_WORKER_ID="victim"
        )
        for item in items:
            await faults.wait_for("heartbeat", work_id=item.id, answered=True, timeout=SECONDS)
        successor = await start_worker(
            start_command_without_settings, plane.base_url, WORKPOOL_WORKER_ID="heir"
        )
        # The second worker must have polled before the first one is killed.
        await successor.wait_for_log("idle")
        victim.send_signal(signal.SIGKILL)
        assert await victim.wait_for_exit() == -signal.SIGKILL
        # Advance the clock to the end of the killed worker's leases, instead of waiting for it.
        clock.advance(LEASE_SECONDS)
        plane.operations.wake_all_polls()
        await faults.wait_for("stop", count=HELD, answered=True, timeout=SECONDS)
        successor.send_signal(signal.SIGTERM)
        assert await successor.wait_for_exit() == 0
    assert plane.summary() == (HELD, HELD, HELD, 0, 0)
    for item in items:
        records = plane.history.records_of_item(item.id)
        acks = [record for record in records if record.kind == "acked"]
        [lapse] = [record for record in records if record.kind == "lapsed"]
        names = [(record.worker_id or "").partition("-")[0] for record in acks]
        assert names == ["victim", "heir"]
        heartbeats = [
            heartbeat
            for heartbeat in records
            if heartbeat.kind == "heartbeat" and heartbeat.time < lapse.time
        ]
        assert lapse.time == heartbeats[-1].lease_end
        assert lapse.time <= acks[1].time
        assert (records[-1].worker_id or "").startswith("heir")


class ControlPlaneClient:
    """A client that records the last state that it read of each item.

    After the control plane was killed and started again, the test compares the items with these
    states.
    """

    def __init__(self, http: aiohttp.ClientSession, port: int) -> None:
        self.known: dict[str, dict[str, Any]] = {}
        self._http = http
        self._url = f"http://127.0.0.1:{port}/api/v1/cloud/environments/{ENVIRONMENT}/work"

    async def send_request(self, method: str, query: str = "", body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = self._url + query
        async with self._http.request(method, url, json=body, headers=headers) as answer:
            assert answer.status == 200
            return await answer.json()

    async def enqueue_until_control_plane_is_killed(self) -> None:
        """Enqueue items until the control plane is killed; record all returned items in `known`.

        The client keeps the number of unfinished items small. The worker may send 20 writes a
        second, and would need minutes for all items that a fast machine can enqueue.
        """
        while True:
            try:
                if sum(item["state"] != "stopped" for item in self.known.values()) < UNFINISHED_MAX:
                    created = await self.send_request("POST", body={"count": 5})
                    self.known |= {item["id"]: item for item in created["data"]}
                self.known |= {item["id"]: item for item in await self.list_items()}
            except (aiohttp.ClientError, ConnectionError):
                return

    async def list_items(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        page: dict[str, Any] = {"has_more": True, "last_id": ""}
        while page["has_more"]:
            after = f"&after_id={page['last_id']}" if page["last_id"] else ""
            page = await self.send_request("GET", f"?limit=100{after}")
            found += page["data"]
        return found

    async def wait_until_items_stopped(self, count: int) -> list[dict[str, Any]]:
        """Wait until `count` items are stopped, and return all items."""
        async with asyncio.timeout(SECONDS):
            while True:
                items = await self.list_items()
                if sum(item["state"] == "stopped" for item in items) >= count:
                    return items
                await asyncio.sleep(0.05)


async def test_killed_control_plane_loses_no_item_and_its_worker_continues(
    start_command_without_settings: CommandStarter, handlers_directory: Path, reserved_port: int
) -> None:
    serve = ["serve", "--port", str(reserved_port), "--store", "work.db", "--json"]
    serve += ["--token", TOKEN, "--environment", ENVIRONMENT]
    plane = await start_command_without_settings(*serve)
    base_url = json.loads(await plane.wait_for_output())["base_url"]
    worker = await start_worker(
        start_command_without_settings, base_url, WORKPOOL_REQUEST_TIMEOUT="3"
    )
    async with aiohttp.ClientSession() as http:
        shell = ControlPlaneClient(http, reserved_port)
        async with asyncio.TaskGroup() as group:
            group.create_task(shell.enqueue_until_control_plane_is_killed())
            await shell.wait_until_items_stopped(50)
            plane.send_signal(signal.SIGKILL)
        assert await plane.wait_for_exit() == -signal.SIGKILL
        plane = await start_command_without_settings(*serve)
        await plane.wait_for_output()
        after = {item["id"]: item for item in await shell.list_items()}
        for work_id, item in shell.known.items():
            assert ORDER.index(after[work_id]["state"]) >= ORDER.index(item["state"])
        await shell.send_request("POST", body={"count": 5})
        items = await shell.wait_until_items_stopped(len(after) + 5)
    assert {item["state"] for item in items} == {"stopped"}
    worker.send_signal(signal.SIGTERM)
    assert await worker.wait_for_exit() == 0
    assert set(count_handler_runs_per_item(handlers_directory)) == {item["id"] for item in items}
    plane.send_signal(signal.SIGTERM)
    assert await plane.wait_for_exit() == 0
