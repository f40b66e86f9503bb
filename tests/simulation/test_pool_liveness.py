"""One pool runs every item in the end, whatever faults its first calls had.

In the random schedules of the simulation, other pools can run what one pool leaves. Here the pool
is alone, so an item that waits forever shows that it does not poll anymore. The tests run in
virtual time.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

import pytest

from tests.simulation.simulated_world import ENVIRONMENT
from tests.simulation.test_regressions import PoolTestbed
from workpool import Session, handler
from workpool.testing.fault import Fault
from workpool.testing.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from workpool.testing.fault_rules import Request

ITEMS: Final = 20
FAULT_SECONDS: Final = 300.0
"""The time in which calls have faults."""
END_SECONDS: Final = 3_000.0
"""The time within which all items must be stopped. Pauses of a failing handler take up to 30 s."""
ANSWERS: Final = (409, 412, 429, 503, "silence", "reset")


class RandomFaults:
    """Gives each call of the first `FAULT_SECONDS` a random fault, or none."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._ratio = self.random.choice((0.1, 0.3, 0.5))
        # A handler that fails only after slow calls does not count as failing, so in half of the
        # runs only claims have faults.
        self._ops = self.random.choice(({"poll", "ack"}, {"poll", "ack", "heartbeat", "stop"}))

    def __call__(self, request: Request) -> Fault | None:
        late = asyncio.get_running_loop().time() > FAULT_SECONDS
        if late or request.op not in self._ops or self.random.random() > self._ratio:
            return None
        delay = self.random.choice((0.0, self.random.uniform(0.0, 8.0)))
        answers = ANSWERS if request.op == "ack" else ANSWERS[2:]
        answer = self.random.choice((None, *answers))
        applied = not isinstance(answer, int) and self.random.random() < 0.5
        return Fault(answer_delay=delay, applied=applied or answer is None, answer=answer)


@pytest.mark.parametrize("first_seed", range(0, 200, 20))
def test_pool_alone_stops_every_item_although_its_first_calls_had_faults(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 20):
        run_pool_alone(seed)


@in_virtual_time
async def run_pool_alone(seed: int) -> None:
    """Run a pool until all items are stopped; fail if they are not within `END_SECONDS`."""
    random.seed(seed)  # The pool's own delays are random, too.
    faults = RandomFaults(seed)
    failing_ratio = faults.random.choice((0.0, 0.9, 1.0))

    @handler
    async def work_or_fail(_: Session) -> None:
        if faults.random.random() < failing_ratio:
            raise ValueError
        await asyncio.sleep(faults.random.uniform(0.0, 5.0))

    bench = PoolTestbed(faults, work_or_fail, concurrency=faults.random.randint(1, 4), pollers=2)
    async with bench.supervisor:
        ids = []
        for _ in range(ITEMS):
            ids += [item.id for item in bench.operations.enqueue(ENVIRONMENT)]
            await asyncio.sleep(faults.random.uniform(0.0, 4.0))
        while any(bench.operations.get_item(ENVIRONMENT, each).state != "stopped" for each in ids):
            assert bench.loop.time() < END_SECONDS, f"seed {seed}: items wait forever"
            await asyncio.sleep(5.0)
