"""Tools for tests of pools and handlers: a pytest fixture, faults, a failing network, virtual time.

    async def test_it(workpool: Kit) -> None:   # the fixture, for tests of handlers
        result = await workpool.run_session(count_rows, metadata={"table": "orders"})

    faults = Faults()                           # without the fixture
    async with ControlPlane(middlewares=[faults.middleware]) as plane:
        faults.add(status(503, retry_after=1), "poll", times=2)
        faults.add(lost(), "ack", times=1)      # applied, but the answer is lost

    recorder = Recorder()                       # a plugin: pass it to the supervisor
    await recorder.wait_for(SessionFinished)

    async with Proxy(plane.base_url) as network:   # `network.base_url` is for one of the workers
        network.partition()                        # its connections stay open and silent

Each wait is bounded. See workpool/docs/testing.md, "Testing handlers".
"""

from workpool.testing.advancing_clock import Clock
from workpool.testing.event_recorder import Recorder
from workpool.testing.fault import (
    Op,
    delay,
    expire_lease,
    expired,
    garbled,
    literal,
    lost,
    reset,
    status,
    trickle,
)
from workpool.testing.fault_rules import Faults, Request, Rule
from workpool.testing.faulty_network import Proxy
from workpool.testing.http_faults import Cut, Hold
from workpool.testing.kit import Kit, SessionResult
from workpool.testing.virtual_time import in_virtual_time

__all__ = [
    "Clock",
    "Cut",
    "Faults",
    "Hold",
    "Kit",
    "Op",
    "Proxy",
    "Recorder",
    "Request",
    "Rule",
    "SessionResult",
    "delay",
    "expire_lease",
    "expired",
    "garbled",
    "in_virtual_time",
    "literal",
    "lost",
    "reset",
    "status",
    "trickle",
]
