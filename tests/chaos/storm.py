"""A chaos test, called a storm: real processes under many kinds of faults at the same time.

`python -m tests.chaos.storm --seed 1` runs a storm of a minute.
Three `workpool run` processes use a control plane on SQLite with faults from a file. Workers
are killed and started again, one is suspended for longer than its lease, one has a failing network,
the control plane itself is killed, operators stop items. Then all faults end, the queue is drained,
and `storm_checker` reads the records.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.chaos.control_plane import seconds_since_boot
from tests.chaos.storm_checker import WAKE_SECONDS, StormChecker, StormResult
from tests.chaos.storm_processes import (
    ENVIRONMENT,
    LEASE_SECONDS,
    SECONDS,
    TOKEN,
    StormProcesses,
    boot_time_by_system_clock,
)
from workpool.testing import Proxy

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping, Sequence

NAMES = ("one", "two", "three")
BEHIND_PROXY = "three"
ACK_LEASE_SECONDS = 60
TICK_SECONDS, LAG_SECONDS = 0.1, 0.2
WORKER_OPS = ["poll", "ack", "heartbeat", "stop", "update", "get"]
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "status", "code": 503, "retry_after": 0.2},
    {"kind": "status", "code": 429, "retry_after": 0.3, "ops": ["poll", "ack", "heartbeat"]},
    {"kind": "status", "code": 502, "html": True, "applied": True},
    {"kind": "status", "code": 500},
    {"kind": "status", "code": 401, "ops": ["heartbeat", "stop", "update"]},
    {"kind": "lost", "applied": True},
    {"kind": "lost", "applied": False},
    {"kind": "reset", "applied": True},
    {"kind": "garbled", "applied": True},
    {"kind": "delay", "seconds": 0.3},
    {"kind": "delay", "seconds": 1.0, "applied": True},
    {"kind": "trickle", "seconds": 0.001},
    {"kind": "expired", "ops": ["heartbeat"]},
)


@dataclass(frozen=True, kw_only=True)
class StormSettings:
    """The settings of a storm: its length, its work, and how often faults occur.

    Attributes:
        seconds: The minimum duration; the storm also waits until a suspended worker resumes.
        ends: The ways in which items end; `release` needs more time than a fresh start leaves.
        fresh: End by killing every worker and moving the control plane's clock, instead of waiting
            for the running workers; this is faster.
        slack: See `storm_checker`.
        write_rate: The own limit of writes per second of each worker; 0 = unlimited.
    """

    seed: int
    write_rate: float = 0.0
    seconds: float = 60.0
    items_per_second: float = 4.0
    longest: float = 20.0
    ends: tuple[str, ...] = ("return", "return", "write", "write", "fail", "release")
    kill_every: float = 2.0
    plane_kill_every: float = 11.0
    stop_beyond: tuple[float, float] = (2.5, 5.0)
    fresh: bool = False
    slack: float = 1.0


class Storm:
    """One run of the chaos test, with its files in a folder of its own.

    Attributes:
        kinds: The kinds of faults, as a file of faults has them.
    """

    kinds: Sequence[Mapping[str, Any]] = KINDS

    def __init__(self, settings: StormSettings, folder: Path) -> None:
        self.settings = settings
        self._random = random.Random(settings.seed)  # noqa: S311 - a storm must be repeatable
        self._fleet = self._make_storm_processes(folder)
        self._faults = folder / "faults.json"
        self._enqueued: list[str] = []
        self._lags: list[dict[str, Any]] = []
        self._clock_change = 0.0
        self._woke = asyncio.Event()
        self._stopped: str | None = None

    async def run_storm(self) -> StormResult:
        """Run the storm, check the guarantees, and return the result."""
        faults = [
            {"ops": WORKER_OPS, "probability": self._random.uniform(0.05, 0.1), **kind}
            for kind in self.kinds
        ]
        self._faults.write_text(json.dumps({"fault": faults}))
        async with (
            Proxy(self._fleet.base_url) as proxy,
            aiohttp.ClientSession() as http,
            self._fleet,
        ):
            await self._start_control_planes(str(self._faults))
            for name in NAMES:
                await self._start_worker(name, proxy)
            await self._enqueue_items_and_inject_faults(http, proxy)
            await self._end_faults_and_finish_items(http, proxy)
        return self._check_workpool_guarantees()

    def _make_storm_processes(self, folder: Path) -> StormProcesses:
        return StormProcesses(folder, self.settings.write_rate)

    async def _start_control_planes(self, faults: str = "") -> None:
        await self._fleet.start_control_plane(self._random.randrange(1 << 30), faults=faults)

    async def _start_worker(self, name: str, proxy: Proxy) -> None:
        await self._fleet.start_worker(name, proxy.base_url if name == BEHIND_PROXY else "")

    async def _enqueue_items_and_inject_faults(
        self, http: aiohttp.ClientSession, proxy: Proxy
    ) -> None:
        async with asyncio.TaskGroup() as group:
            disturbances = [
                group.create_task(disturbance)
                for disturbance in (
                    self._enqueue_items(http),
                    self._kill_workers(proxy),
                    self._suspend_workers(),
                    *self._list_control_plane_faults(),
                    self._stop_items(http),
                    self._disturb_network(proxy),
                    self._record_loop_lag(),
                )
            ]
            await asyncio.sleep(self.settings.seconds)
            async with asyncio.timeout(4 * SECONDS):
                await self._woke.wait()
            for disturbance in disturbances:
                disturbance.cancel()
        if self._stopped is not None:  # a worker is still suspended, so resume it
            self._fleet.send_signal("cont", self._stopped)

    async def _enqueue_items(self, http: aiohttp.ClientSession) -> None:
        for number in count():
            chance = self._random.random()
            # The first sessions are long, so that the first suspended worker is running one.
            is_long = chance > 0.65 or number < 2 * len(NAMES)
            seconds = self._random.uniform(3, self.settings.longest) if is_long else chance * 3
            metadata = {"seconds": f"{seconds:.2f}", "end": self._random.choice(self.settings.ends)}
            answer = await self._send_request(http, "POST", "", {"metadata": metadata})
            # If the answer was lost, the item may exist although `_enqueued` lacks its id. The
            # last snapshot then contains the item.
            if answer is not None:
                self._enqueued += [item["id"] for item in answer["data"]]
            if number >= 2 * len(NAMES):
                await asyncio.sleep(self._random.expovariate(self.settings.items_per_second))

    async def _send_request(
        self, http: aiohttp.ClientSession, method: str, path: str, body: Any = None
    ) -> Any:
        """Send a request without Worker-ID, as an operator does; return None if it fails."""
        url = f"{self._fleet.base_url}/environments/{ENVIRONMENT}/work{path}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        timeout = aiohttp.ClientTimeout(total=5)
        with suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
            async with http.request(
                method, url, json=body, headers=headers, timeout=timeout
            ) as answer:
                return await answer.json() if answer.status == 200 else None
        return None

    async def _kill_workers(self, proxy: Proxy) -> None:
        while True:
            await asyncio.sleep(self.settings.kill_every)
            name = self._random.choice([each for each in NAMES if each != self._stopped])
            await self._fleet.kill_worker(name)
            await self._start_worker(name, proxy)

    async def _suspend_workers(self) -> None:
        """Repeatedly suspend a busy worker, each time for longer than its leases last."""
        while True:
            self._stopped = await self._wait_for_busy_worker()
            self._fleet.send_signal("stop", self._stopped)
            await asyncio.sleep(LEASE_SECONDS + self._random.uniform(*self.settings.stop_beyond))
            self._fleet.send_signal("cont", self._stopped)
            # Let the resumed worker run for some time, so that the checker sees its next requests.
            await asyncio.sleep(WAKE_SECONDS + 0.5)
            self._stopped = None
            self._woke.set()

    async def _wait_for_busy_worker(self) -> str:
        while True:
            await asyncio.sleep(0.2)
            running: dict[int, int] = {}
            for line in read_json_lines(self._fleet.folder / "trace"):
                delta = 1 if line["what"] == "start" else -1
                running[line["pid"]] = running.get(line["pid"], 0) + delta
            workers = self._fleet.workers.items()
            busy = [name for name, process in workers if running.get(process.pid, 0) >= 2]
            if busy:
                return self._random.choice(busy)

    def _list_control_plane_faults(self) -> list[Coroutine[Any, Any, None]]:
        return [self._kill_control_plane()]

    async def _kill_control_plane(self) -> None:
        while True:
            await asyncio.sleep(self.settings.plane_kill_every * self._random.uniform(0.7, 1.3))
            await self._start_control_planes(str(self._faults))

    async def _stop_items(self, http: aiohttp.ClientSession) -> None:
        """Stop an item every few seconds, gracefully or by force."""
        while True:
            await asyncio.sleep(self._random.uniform(2, 4))
            if self._enqueued:
                work_id = self._random.choice(self._enqueued[-10:])
                force = self._random.random() < 0.3
                await self._send_request(http, "POST", f"/{work_id}/stop", {"force": force})

    async def _disturb_network(self, proxy: Proxy) -> None:
        # `proxy.partition` must not be one of these faults. It holds requests back and delivers
        # them later, and the checker would take them for requests that were sent too late.
        faults = (
            proxy.blackhole,
            proxy.reset,
            proxy.half_close,
            lambda: proxy.delay(0.2),
            lambda: proxy.throttle(4000),
        )
        while True:
            await asyncio.sleep(self._random.uniform(1, 4))
            self._random.choice(faults)()
            await asyncio.sleep(self._random.uniform(1, LEASE_SECONDS + 6))
            proxy.heal()

    async def _record_loop_lag(self) -> None:
        """Record the length of each delay of this event loop, and changes of the system's clock.

        A busy machine delays the workers in the same way, and the checker allows for that.
        """
        while True:
            before = seconds_since_boot()
            await asyncio.sleep(TICK_SECONDS)
            lag = seconds_since_boot() - before - TICK_SECONDS
            if lag > LAG_SECONDS:
                self._lags.append({"t": seconds_since_boot(), "what": "lag", "seconds": lag})
            change = abs(boot_time_by_system_clock() - self._fleet.offset)
            self._clock_change = max(self._clock_change, change)

    async def _end_faults_and_finish_items(self, http: aiohttp.ClientSession, proxy: Proxy) -> None:
        proxy.heal()
        if self.settings.fresh:
            for name in NAMES:
                if not self._fleet.was_killed(name):
                    await self._fleet.kill_worker(name)
            await self._fleet.start_control_plane(0, ahead=ACK_LEASE_SECONDS + 1)
            await self._fleet.start_worker("last", "", "--drain", "--concurrency", "64")
            await self._fleet.wait_for_clean_exit("last")
        else:
            await self._start_control_planes()
            for name in NAMES:
                # The storm may have ended between the kill and the restart of a worker.
                if self._fleet.was_killed(name):
                    await self._fleet.workers[name].wait()
                    await self._start_worker(name, proxy)
            await self._wait_until_all_items_stopped(http)
            for name in NAMES:
                self._fleet.workers[name].terminate()
                await self._fleet.wait_for_clean_exit(name)
        await self._fleet.stop_control_planes()

    async def _wait_until_all_items_stopped(self, http: aiohttp.ClientSession) -> None:
        """Wait until all items are stopped, but at most for twice the lease of an ack."""
        until = seconds_since_boot() + 2 * ACK_LEASE_SECONDS
        while await self._has_unfinished_items(http):
            if seconds_since_boot() > until:
                return
            await asyncio.sleep(0.5)

    async def _has_unfinished_items(self, http: aiohttp.ClientSession) -> bool:
        after = ""
        while True:
            page = await self._send_request(http, "GET", f"?limit=100{after}")
            if page is None or any(item["state"] != "stopped" for item in page["data"]):
                return True
            if not page["has_more"]:
                return False
            after = f"&after_id={page['last_id']}"

    def _check_workpool_guarantees(self) -> StormResult:
        folder = self._fleet.folder
        checker = StormChecker(
            self._collect_journal_lines(),
            read_json_lines(folder / "trace"),
            self._fleet.actions,
            self._fleet.worker_ids_by_pid(),
            slack=self.settings.slack,
        )
        verdict = checker.check_storm(self._enqueued)
        verdict.broken += self._fleet.broken
        verdict.clock_change = self._clock_change
        return verdict

    def _collect_journal_lines(self) -> list[dict[str, Any]]:
        return [*read_json_lines(self._fleet.folder / "journal"), *self._lags]


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal or trace as dicts, except for an incomplete last line."""
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                yield json.loads(line)


def format_report(settings: StormSettings, verdict: StormResult) -> str:
    """Return the result of a storm as text."""
    return "\n".join(
        [
            f"seed {settings.seed}, {settings.seconds:g} s, {settings.write_rate:g} writes/s",
            *(f"  {name:45} {count:6}" for name, count in sorted(verdict.counts.items())),
            f"  latest request after its lease: {verdict.latest:.3f} s",
            f"  the system's clock was set by: {verdict.clock_change:.3f} s",
            *(f"  BROKEN: {text}" for text in verdict.broken or ["nothing"]),
        ]
    )


def main() -> None:
    """Run one storm, and print its result and the folder of its files.

    The exit status is 1 if a guarantee was violated.
    """
    # Handle SIGTERM like Ctrl-C. Otherwise it would end this process, but not the workers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = parse_settings(__doc__)
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    verdict = asyncio.run(Storm(settings, folder).run_storm())
    print(f"{folder}\n{format_report(settings, verdict)}")  # noqa: T201 - what it is for
    sys.exit(1 if verdict.broken else 0)


def parse_settings(description: str | None) -> StormSettings:
    """Read the settings of the storm from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write-rate", type=float, default=20.0, help="of each worker, per second")
    given = parser.parse_args()
    return StormSettings(seed=given.seed, seconds=given.seconds, write_rate=given.write_rate)


if __name__ == "__main__":
    main()
