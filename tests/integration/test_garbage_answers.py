"""A control plane that answers garbage for an hour crashes no pool and loses no item."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, Settings, handler
from workpool.events import PluginFailed, PollerRestarted
from workpool.server import Item, Operations
from workpool.testing import Recorder
from workpool.testing.fault import Fault
from workpool.testing.local_client import LocalClient
from workpool.testing.loop_supervisor import ThreadlessSupervisor
from workpool.testing.virtual_time import VirtualLoop, run_on_virtual_loop

if TYPE_CHECKING:
    from workpool.testing.fault_rules import Request

ENVIRONMENT = "env_00000000000070008000000000000001"
HOUR_SECONDS = 3600.0
ITEMS = 120
BODIES = (
    b"", b"null", b"true", b"{", b"[]", b"{}", b'"item"', b"\xff\xfe", b"NaN", b"1e999",
    b"[" * 5000, b'{"id": 5}', b'{"id": "../../x", "state": "queued"}', b"<html>Bad Gateway</html>",
    b'{"data": [{}], "has_more": true}', b'{"lease_extended": "yes"}', b"\x00" * 10_000,
)  # fmt: skip
STATUSES = (202, 204, 206, 302, 304, 402, 405, 408, 418, 425, 429, 451, 500, 502, 503, 507, 599)
VALUES: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    2**63 - 1,
    1e300,
    "",
    "x" * 5000,
    "../..",
    "stopped",
    [],
    {},
    [[]],
)


class RandomGarbageFaults:
    """A fault script that replaces seven of ten answers by garbage of every kind, for an hour."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)  # noqa: S311 - repeatable, guards nothing
        self.replaced = 0

    def __call__(self, _: Request) -> Fault | None:
        if asyncio.get_running_loop().time() > HOUR_SECONDS or self.dice.random() < 0.3:
            return None
        self.replaced += 1
        applied = self.dice.random() < 0.5
        match self.dice.randrange(4):
            case 0:
                return Fault(applied=applied, answer=self.dice.choice(BODIES))
            case 1:
                after = self.dice.choice((None, None, 0.0, -5.0, 3.0, 1e12, float("nan")))
                return Fault(applied=applied, answer=self.dice.choice(STATUSES), retry_after=after)
            case 2:
                return Fault(rewrite=self._replace_answer_by_garbage)
            case _:
                return Fault(applied=applied, answer=self.dice.choice(("silence", "reset")))

    def _replace_answer_by_garbage(self, answer: Any) -> Any:
        if isinstance(answer, dict) and answer:
            name = self.dice.choice(sorted(answer))
            answer[name] = self.dice.choice(VALUES)
        return answer


@pytest.mark.parametrize("seed", range(3))
def test_pool_completes_all_items_after_an_hour_of_garbled_answers(seed: int) -> None:
    async def run_pool_for_two_hours() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        operations = Operations([ENVIRONMENT], now=lambda: 1e9 + loop.machine_time())
        garbage, recorder = RandomGarbageFaults(seed), Recorder()
        running: set[str] = set()

        @handler
        async def write_metadata_and_return(session: Session) -> dict[str, str]:
            assert session.item.id not in running
            running.add(session.item.id)
            try:
                await asyncio.sleep(garbage.dice.uniform(0, 90))
                await session.update_metadata({"half": "done"})
                return {"done": "yes"}
            finally:
                running.discard(session.item.id)

        settings = Settings(environment_id=ENVIRONMENT, token=ENVIRONMENT, stats_interval=60)
        supervisor = ThreadlessSupervisor(
            settings,
            plugins=[write_metadata_and_return, recorder],
            connect=partial(LocalClient, operations, faults=garbage),
        )
        async with supervisor:
            items: list[Item] = []
            for _ in range(ITEMS):
                items += operations.enqueue(ENVIRONMENT)
                await asyncio.sleep(HOUR_SECONDS / ITEMS)
            while any(
                operations.get_item(ENVIRONMENT, item.id).state != "stopped" for item in items
            ):
                assert loop.time() < 2 * HOUR_SECONDS
                await asyncio.sleep(10)
            assert supervisor.status().error is None
        assert garbage.replaced > 1000
        assert not recorder.of(PollerRestarted)
        assert not recorder.of(PluginFailed)

    run_on_virtual_loop(run_pool_for_two_hours())
