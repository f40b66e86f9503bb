"""Several machines on one virtual loop: each may be suspended, stopped or crash by itself.

Which machine a callback belongs to is told by its context. One that does not run keeps its
callbacks waiting, for ever if it has crashed: a pool that vanishes with everything that it knew.
"""

from __future__ import annotations

import asyncio
import heapq
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVarTuple, Unpack

from workpool.testing.virtual import VirtualLoop

if TYPE_CHECKING:
    import selectors
    from collections import deque
    from collections.abc import Callable

Ts = TypeVarTuple("Ts")

Halt = Literal["asleep", "stopped", "paused", "crashed"]

NETWORK: Final = Context()
"""Belongs to no machine: what is under way arrives, whatever becomes of its sender."""


INSTANT_SECONDS: Final = 1e-9
"""What a timer takes at least: else who waits for what rounding keeps from coming would spin."""


class Machine:
    """One pool's computer, and its process: a restart is another one.

    Attributes:
        halted: Why nothing runs on it now.
        blocked: Nothing runs on it now, or soon will not.
        pauses: From when to when it did not run, on the loop's clock.
        unseen: Those of `pauses` that only its wall clock shows.
        slept: Seconds for which its timers have stood still.
        frozen: Seconds for which its lease clock has stood still as well.
        stage: Where its handlers play.
    """

    stage: Any

    def __init__(self, loop: MachinesLoop, name: str, rate: float = 1.0) -> None:
        """`rate`: seconds of its lease clock per second."""
        self.name = name
        self.halted: Halt | None = None
        self.blocked = False
        self.pauses: list[tuple[float, float]] = []
        self.unseen: list[tuple[float, float]] = []
        self.slept = self.frozen = 0.0
        self._planned: tuple[Halt, float] = ("asleep", 0.0)
        self._steps_left = 0
        self._loop = loop
        self._rate = rate
        self._halted_at = 0.0
        self._waiting: list[asyncio.Handle] = []

    def clock(self) -> float:
        """Tell the time that leases are measured on: it goes on unless the machine is `paused`."""
        return (self._loop.now - self.frozen) * self._rate

    def wall(self) -> float:
        """Tell the time of day: it goes on whatever the machine does."""
        return self._loop.now

    def context(self) -> Context:
        """Make a context in which everything belongs to this machine."""
        context = copy_context()
        context.run(_MACHINE.set, self)
        return context

    def halt(self, how: Halt, seconds: float | None = None) -> None:
        """Let nothing run any more, for `seconds` or until `go_on`.

        While it is `asleep`, timers stand still as well; while it is `paused`, the lease clock too.
        """
        if self.halted is not None:
            if how != "crashed":
                return
            self._end_halt()
        self.halted, self._halted_at = how, self._loop.now
        self.blocked = True
        if seconds is not None:
            self._loop.call_at(self._loop.now + seconds, self.go_on, context=NETWORK)

    def halt_after(self, steps: int, how: Halt, seconds: float) -> None:
        """Halt after so many more callbacks: in the middle of what they have begun."""
        if self.halted is None:
            self.blocked = True
            self._planned, self._steps_left = (how, seconds), steps

    def go_on(self) -> None:
        """Run again, what has waited first. A crash is final."""
        if self.halted != "crashed":
            if self.halted is not None:
                self._end_halt()
            self._release()

    def _end_halt(self) -> None:
        pause = self._halted_at, self._loop.now
        seconds = pause[1] - pause[0]
        self.pauses.append(pause)
        if self.halted in {"asleep", "paused"}:
            self.slept += seconds
        if self.halted == "paused":
            self.unseen.append(pause)
            self.frozen += seconds

    def bury(self) -> None:
        """The play is over: let what is left of it be cancelled."""
        self._release()

    def wait(self, handle: asyncio.Handle) -> None:
        """Keep a callback until the machine runs; let it run if the machine is yet to halt."""
        if self.halted is None:
            self._steps_left -= 1
            if self._steps_left >= 0:
                self._loop.run_soon(handle)
                return
            self.halt(*self._planned)
        self._waiting.append(handle)

    def _release(self) -> None:
        self.halted, self.blocked = None, False
        waiting, self._waiting = self._waiting, []
        for handle in waiting:
            self._loop.run_soon(handle)


_MACHINE: ContextVar[Machine | None] = ContextVar("machine", default=None)


def this_machine() -> Machine:
    """Return the machine that the caller runs on."""
    machine = _MACHINE.get()
    assert machine is not None
    return machine


class _Timer(asyncio.TimerHandle):
    """A timer of a machine, or of none: it stands still while that sleeps."""

    __slots__ = ("_machine", "_slept")

    _when: float

    _loop: MachinesLoop

    def __init__(self, when: float, machine: Machine | None, *rest: Any) -> None:
        super().__init__(when, *rest)
        self._machine = machine
        self._slept = 0.0 if machine is None else machine.slept

    def _run(self) -> None:
        machine = self._machine
        self._loop.now = max(self._loop.now, self._when)  # else who waits for it spins
        if machine is None:
            super()._run()
        elif machine.blocked:
            machine.wait(self)
        elif machine.slept > self._slept:
            self._when += machine.slept - self._slept
            self._slept = machine.slept
            self._loop.push(self)
        else:
            super()._run()


class MachinesLoop(VirtualLoop):
    """A virtual loop for several machines. `now` is the same for all, `time()` each one's own."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _selector: selectors.BaseSelector

    def __init__(self) -> None:
        super().__init__()
        selector: Any = self._selector
        selector.select = self._leap  # there are no sockets to ask about

    def _leap(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits for what no timer will bring")
        self._now += timeout
        return []

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return self._now

    @now.setter
    def now(self, seconds: float) -> None:
        self._now = seconds

    def time(self) -> float:
        """Return the loop's clock as the running machine sees it."""
        machine = _MACHINE.get()
        return self._now if machine is None else self._now - machine.slept

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Run it in this step, or once its machine runs."""
        machine = _MACHINE.get() if context is None else context.get(_MACHINE)
        handle = asyncio.Handle(callback, args, self, context)
        if machine is None or not machine.blocked:
            self._ready.append(handle)
        else:
            machine.wait(handle)
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """There are no other threads."""
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run it at `when` of the machine's `time()`."""
        machine = _MACHINE.get() if context is None else context.get(_MACHINE)
        when += 0.0 if machine is None else machine.slept
        when = max(when, self._now + INSTANT_SECONDS)
        timer = _Timer(when, machine, callback, args, self, context)
        self.push(timer)
        return timer

    def push(self, timer: asyncio.TimerHandle) -> None:
        """Set a timer, for the first time or again."""
        heapq.heappush(self._scheduled, timer)
        scheduled: Any = timer
        scheduled._scheduled = True

    def run_soon(self, handle: asyncio.Handle) -> None:
        """Run a callback that has waited."""
        if not handle.cancelled():
            self._ready.append(handle)


def run_machines(main: Callable[[], Any]) -> Any:
    """Run `main()` on such a loop, and cancel what is left at its end."""
    with asyncio.Runner(loop_factory=MachinesLoop) as runner:
        return runner.run(main())
