"""The network of a simulation: every pool's calls, what befalls them, and a note of each."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from workpool.errors import ControlPlaneError, TransientError
from workpool.server import Poll
from workpool.server.dialects import QODER
from workpool.testing.local import LocalClient, Trouble, answer_to
from workpool.testing.simulation.machine import NETWORK, MachinesLoop
from workpool.testing.simulation.trace import LATENCY_SECONDS, Delay, Sent
from workpool.wire import calls
from workpool.wire.options import DEFAULT_OPTIONS, CallOptions, Priority
from workpool.wire.rate_limiter import RateLimiter

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from random import Random

    from workpool.server import Operations
    from workpool.settings import Settings
    from workpool.testing.simulation.machine import Halt
    from workpool.testing.simulation.schedule import Schedule
    from workpool.testing.simulation.trace import Node, Trace
    from workpool.wire.answers import Answer
    from workpool.wire.calls import Call
    from workpool.wire.items import WorkItem

    Reply = Answer | Literal["silence", "reset"]

T = TypeVar("T")

FADED_SECONDS: Final = 20.0
FADING: Final = frozenset({"heartbeat", "update", "stop"})
OUTLASTING_SHARE: Final = 0.5
SLEEPS: Final[tuple[Halt, ...]] = ("asleep", "paused")
PATIENCE_MS: Final = 8_000
"""How long a poll waits here, whatever `block_ms`: waiting costs the simulation, not the pool."""
DENIAL: Final = Trouble(
    there=LATENCY_SECONDS, back=LATENCY_SECONDS, applied=False, answer=HTTPStatus.FORBIDDEN
)
SILENCE: Final = Trouble(there=LATENCY_SECONDS, applied=False, answer="silence")


class Network:
    """Between the pools and the control plane of one simulation.

    Attributes:
        healed: Nothing befalls any call any more.
        over: The simulation has ended; what is still sent goes nowhere.
    """

    def __init__(
        self, schedule: Schedule, random: Random, operations: Operations, trace: Trace
    ) -> None:
        self.operations = operations
        self.trace = trace
        self.healed = False
        self.over = False
        self.serving: set[asyncio.Task[None]] = set()
        self._random = random
        self._share = schedule.troubles
        self._kinds = schedule.kinds

    def befalls(self, node: Node, op: str, work_id: str | None) -> Trouble:
        """Decide what happens to a call."""
        if self.over:
            return SILENCE
        trouble = None if self.healed else self._draw(node, op)
        if trouble is None:
            return node.calm
        self.trace.troubles += 1
        if trouble.wait and work_id is not None:
            now = _loop().now
            self.trace.delays.append(Delay(node, work_id, now, now + trouble.wait))
        return trouble

    def _draw(self, node: Node, op: str) -> Trouble | None:
        if _within(node.cuts):
            return SILENCE
        if op == "ack" and _within(node.denials):
            return DENIAL
        if not self._share or self._random.random() >= self._share:
            return None
        kind = self._random.choice(self._kinds)
        trouble = make_trouble(kind, self._random)
        if kind == "asleep" and op != "poll":  # the machine falls asleep while the call waits
            self._fall_asleep(node, trouble.wait / 2)
        elif kind == "drowsy":  # or somewhere in the work that follows the answer
            trouble = self._doze(node, trouble)
        elif kind == "fading" and op in FADING:  # a slow answer, and then none
            now = _loop().now
            node.cuts.append((now + LATENCY_SECONDS, now + FADED_SECONDS))
        return trouble

    def leaves(self, node: Node, op: str, work_id: str | None, trouble: Trouble) -> Sent | None:
        """Note a call whose bytes are sent now."""
        if self.over:
            return None
        sent = Sent(_loop().now, node, op, work_id, None if trouble is node.calm else trouble)
        self.trace.sent.append(sent)
        return sent

    def _doze(self, node: Node, trouble: Trouble) -> Trouble:
        """Let the machine stand still around the answer; some answers come after that."""
        seconds, steps = trouble.there + trouble.back, self._random.randint(0, 12)
        if self._random.random() < OUTLASTING_SHARE:
            length = self._fall_asleep(node, seconds, steps, "paused")
            return replace(trouble, back=length + self._random.uniform(0, 3))
        self._fall_asleep(node, seconds, steps)
        return trouble

    def _fall_asleep(
        self, node: Node, seconds: float, steps: int = 0, how: Halt | None = None
    ) -> float:
        """Let the machine stand still after `seconds` and so many callbacks; return how long."""
        loop, length = _loop(), self._random.choice((5.0, 15.0, 40.0, 70.0))
        kind = self._random.choice(SLEEPS) if how is None else how

        def sleep() -> None:
            if not self.healed:
                node.machine.halt_after(steps, kind, length)

        loop.call_at(loop.now + seconds, sleep, context=NETWORK)
        return length


def make_trouble(kind: str, random: Random) -> Trouble:
    """One trouble of a kind of `schedule.TROUBLES`."""
    there = LATENCY_SECONDS
    match kind:
        case "drowsy":
            return Trouble(there=there, back=there)
        case "wait" | "asleep":
            return Trouble(random.uniform(0.05, 9.0), there, there)
        case "late" | "fading":
            return Trouble(there=random.uniform(0.01, 1.5), back=random.uniform(0.01, 1.5))
        case "slow":
            seconds = random.uniform(1, 40)
            first = random.choice((True, False))
            return (
                Trouble(there=seconds, back=there) if first else Trouble(there=there, back=seconds)
            )
        case _:
            return _wrong_answer(kind, random)


def _wrong_answer(kind: str, random: Random) -> Trouble:
    """No answer, or another one than the control plane's."""
    there = LATENCY_SECONDS
    match kind:
        case "silence":
            return SILENCE
        case "lost":
            return Trouble(there=there, answer="silence")
        case "reset" | "reset-applied":
            return Trouble(there=there, back=there, applied=kind != "reset", answer="reset")
        case "garbage" | "garbage-applied":
            return Trouble(
                there=there, back=there, applied=kind != "garbage", answer=b'{"id": "work_'
            )
        case "500":
            return Trouble(
                there=there, back=there, applied=random.choice((True, False)), answer=500
            )
        case _:
            after = random.choice((None, 0.5, 5.0, 40.0)) if kind in {"503", "429"} else None
            return Trouble(
                there=there, back=there, applied=False, answer=int(kind), retry_after=after
            )


class Client(LocalClient):
    """One pool's client: on its machine, through the network."""

    def __init__(self, network: Network, node: Node, settings: Settings) -> None:
        super().__init__(network.operations, settings)
        self._network = network
        self._node = node
        self._sent: Sent | None = None
        self._patch: Mapping[str, str | None] = {}
        if rate := node.pool.write_rate:
            self.rate_limits.write = RateLimiter("write", rate, _loop().time)

    async def __aenter__(self) -> Client:
        """Open; from now on the pool has a name."""
        self._node.worker_id = self.worker_id or ""
        await super().__aenter__()
        return self

    async def poll(
        self,
        block_ms: int | None = None,
        reclaim_older_than_ms: int | None = None,
        *,
        timeout: float | None = None,
    ) -> WorkItem | None:
        """Protocol §3.1, with more patience; what was sent arrives, whatever becomes of us."""
        del block_ms, timeout
        loop = _loop()
        self._node.polls += 1
        trouble = self._befalls("poll", None)
        if trouble.wait:
            await asyncio.sleep(trouble.wait)
        self._leaves("poll", None, trouble)
        answered: asyncio.Future[Reply] = loop.create_future()
        poll = Poll(self.worker_id, PATIENCE_MS, reclaim_older_than_ms or 0)
        travel = partial(self._travel, poll, trouble, answered)
        loop.call_at(loop.now + trouble.there, travel, context=NETWORK)

        async def exchange() -> Reply:
            return await answered

        return await self._settle(calls.POLL, exchange(), self._timeout + PATIENCE_MS / 1000)

    async def update_metadata(
        self,
        work_id: str,
        patch: Mapping[str, str | None],
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Update metadata and note the patch."""

        def check() -> None:
            if options.check is not None:
                options.check()
            self._patch = dict(patch)  # the call leaves in this very step

        noting = options._replace(check=check)
        return await super().update_metadata(work_id, patch, timeout=timeout, options=noting)

    def _travel(self, poll: Poll, trouble: Trouble, answered: asyncio.Future[Reply]) -> None:
        """The poll has arrived. A task of nobody's: the control plane serves it."""
        task = _loop().create_task(self._serve(poll, trouble, answered), context=NETWORK)
        self._network.serving.add(task)
        task.add_done_callback(self._network.serving.discard, context=NETWORK)

    async def _serve(self, poll: Poll, trouble: Trouble, answered: asyncio.Future[Reply]) -> None:
        item = None
        if trouble.applied:
            item = await self._operations.long_poll(
                self._environment_id, poll, lambda: self._gone(answered)
            )
        reply = answer_to(trouble, lambda: None if item is None else QODER.item(item))
        if reply != "silence":
            await asyncio.sleep(trouble.back)
            if not answered.done():
                answered.set_result(reply)

    def _gone(self, answered: asyncio.Future[Reply]) -> bool:
        return answered.cancelled() or self._node.machine.halted == "crashed"

    async def acquire_ack_permit(self) -> None:
        """Note when it was acquired."""
        await super().acquire_ack_permit()
        if self.rate_limits.write.limited:
            self._node.claim_permits.append(_loop().now)

    async def _acquire(self, priority: Priority, seconds: float | None) -> None:
        began = _loop().now
        try:
            await super()._acquire(priority, seconds)
        finally:
            if (now := _loop().now) > began and priority != Priority.CLAIM:
                self._network.trace.delays.append(Delay(self._node, None, began, now))

    def _carry(self, seconds: float, arrive: Callable[[], None]) -> None:
        loop = _loop()
        loop.call_at(loop.now + seconds, arrive, context=NETWORK)

    def _befalls(self, op: str, work_id: str | None) -> Trouble:
        super()._befalls(op, work_id)
        return self._network.befalls(self._node, op, work_id)

    def _leaves(self, op: str, work_id: str | None, trouble: Trouble) -> None:
        self._sent = self._network.leaves(self._node, op, work_id, trouble)
        if op == "update" and self._sent is not None:
            self._sent.patch = self._patch

    async def _settle(
        self, call: Call[T], exchange: Coroutine[Any, Any, Reply], seconds: float
    ) -> T:
        sent = self._sent  # set in this very step
        answer: str | int | None = None
        try:
            value = await super()._settle(call, exchange, seconds)
        except ControlPlaneError as error:
            answer = "lost" if isinstance(error, TransientError) else error.status
            raise
        else:
            answer = "ok"
            if sent is not None:
                sent.told = value
            return value
        finally:
            if sent is not None:
                sent.answer, sent.answered_at = answer, _loop().now


def _within(times: list[tuple[float, float]]) -> bool:
    """Whether it is now between any two of the times."""
    now = _loop().now
    return any(since <= now < until for since, until in times)


def _loop() -> MachinesLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, MachinesLoop)
    return loop
