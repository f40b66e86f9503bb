"""Simulated machines on one virtual event loop; a machine can sleep, pause, stop or crash.

The context of a callback says which machine it belongs to. A halted machine postpones its callbacks
until it resumes. A crashed machine never resumes.
"""

from __future__ import annotations

import asyncio
import heapq
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, TypeVarTuple, Unpack

from workpool.testing.virtual_time import VirtualLoop

if TYPE_CHECKING:
    import selectors
    from collections import deque
    from collections.abc import Callable
    from concurrent.futures import Executor

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

HaltKind = Literal["asleep", "stopped", "paused", "crashed"]

NETWORK: Final = Context()
"""The context of no machine: a request in flight arrives even if its sender halts."""


INSTANT_SECONDS: Final = 1e-9
"""The shortest timer. With 0, rounding could make code that waits for a time loop without end."""


class SimulatedMachine:
    """The simulated machine of one process; a restarted process gets a new machine.

    Attributes:
        halted: Why the machine is halted; None while it runs.
        blocked: The machine is halted, or will be after some more callbacks.
        pauses: Start and end of each halt, on the loop's clock.
        unseen: Those of `pauses` that only its wall clock shows.
        slept: Total seconds for which its timers stood still.
        frozen: Total seconds for which its lease clock stood still as well.
        handlers: The simulated handlers of its pool.
        max_sessions: The limit of that handler; None: no limit.
    """

    handlers: Any
    max_sessions: int | None = None

    def __init__(self, loop: MultiMachineLoop, name: str, rate: float = 1.0) -> None:
        """Create a machine whose lease clock counts `rate` seconds per second of virtual time."""
        self.name = name
        self.halted: HaltKind | None = None
        self.blocked = False
        self.pauses: list[tuple[float, float]] = []
        self.unseen: list[tuple[float, float]] = []
        self.slept = self.frozen = 0.0
        self._planned: tuple[HaltKind, float] = ("asleep", 0.0)
        self._steps_left = 0
        self._loop = loop
        self._rate = rate
        self._halted_at = 0.0
        self._kept: list[asyncio.Handle] = []

    def lease_clock(self) -> float:
        """Return the lease clock, which stands still only while `halted` is "paused"."""
        return (self._loop.now - self.frozen) * self._rate

    def wall_clock(self) -> float:
        """Return the wall clock, which never stands still."""
        return self._loop.now

    def make_context_of_machine(self) -> Context:
        """Return a context whose callbacks run on this machine."""
        context = copy_context()
        context.run(_MACHINE.set, self)
        return context

    def halt(self, how: HaltKind, seconds: float | None = None) -> None:
        """Halt the machine for `seconds`, or until `resume` is called.

        While it is `asleep`, its timers stand still as well; while `paused`, its lease clock too.
        """
        if self.halted is not None:
            if how != "crashed":
                return
            self._record_period_of_halt()
        self.halted, self._halted_at = how, self._loop.now
        self.blocked = True
        if seconds is not None:
            self._loop.call_at(self._loop.now + seconds, self.resume, context=NETWORK)

    def halt_after_number_of_callbacks(self, steps: int, how: HaltKind, seconds: float) -> None:
        """Halt the machine once it has run `steps` more callbacks, even amid an operation."""
        if self.halted is None:
            self.blocked = True
            self._planned, self._steps_left = (how, seconds), steps

    def resume(self) -> None:
        """Resume the machine, and run the callbacks that it postponed; do nothing after a crash."""
        if self.halted != "crashed":
            if self.halted is not None:
                self._record_period_of_halt()
            self._run_postponed_callbacks()

    def _record_period_of_halt(self) -> None:
        pause = self._halted_at, self._loop.now
        seconds = pause[1] - pause[0]
        self.pauses.append(pause)
        if self.halted in {"asleep", "paused"}:
            self.slept += seconds
        if self.halted == "paused":
            self.unseen.append(pause)
            self.frozen += seconds

    def shut_down(self) -> None:
        """Run the postponed callbacks of the machine, so that its tasks can end."""
        self._run_postponed_callbacks()

    def postpone_callback(self, handle: asyncio.Handle) -> None:
        """Postpone a callback until the machine resumes.

        If `halt_after_number_of_callbacks` still allows this callback before the halt, run it now.
        """
        if self.halted is None:
            self._steps_left -= 1
            if self._steps_left >= 0:
                self._loop.run_postponed_callback(handle)
                return
            self.halt(*self._planned)
        self._kept.append(handle)

    def _run_postponed_callbacks(self) -> None:
        self.halted, self.blocked = None, False
        kept, self._kept = self._kept, []
        for handle in kept:
            self._loop.run_postponed_callback(handle)


_MACHINE: ContextVar[SimulatedMachine | None] = ContextVar("machine", default=None)

EVENT_LOOP: Final[ContextVar[str]] = ContextVar("event_loop", default="handlers")
"""The event loop of a real pool on which the current callback would run."""

THREAD_SECONDS: Final = 0.001
"""Duration of a call on a thread."""


def current_machine() -> SimulatedMachine:
    """Return the machine to which the current callback belongs."""
    machine = _MACHINE.get()
    assert machine is not None
    return machine


class _MachineTimer(asyncio.TimerHandle):
    """A timer that stands still while its machine sleeps."""

    __slots__ = ("_machine", "_slept")

    _when: float

    _loop: MultiMachineLoop

    def __init__(self, when: float, machine: SimulatedMachine | None, *rest: Any) -> None:
        super().__init__(when, *rest)
        self._machine = machine
        self._slept = 0.0 if machine is None else machine.slept

    def _run(self) -> None:
        machine = self._machine
        # The event loop may run a timer a little before the time `_when`. Set the clock to `_when`,
        # or code that waits for the time `_when` would wait again without end.
        self._loop.now = max(self._loop.now, self._when)
        if machine is None:
            super()._run()
        elif machine.blocked:
            machine.postpone_callback(self)
        elif machine.slept > self._slept:
            self._when += machine.slept - self._slept
            self._slept = machine.slept
            self._loop.push_timer(self)
        else:
            super()._run()


class MultiMachineLoop(VirtualLoop):
    """A virtual event loop of several machines.

    Each machine has its own `time()`. `now` is the same for all of them.
    """

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _selector: selectors.BaseSelector

    def __init__(self) -> None:
        super().__init__()
        selector: Any = self._selector
        # A simulation has no sockets. Where a real loop waits for them, advance the virtual time.
        selector.select = self._advance_time

    def _advance_time(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits for something that no timer brings about")
        self._now += timeout
        return []

    @property
    def now(self) -> float:
        """Seconds since the start of the simulation."""
        return self._now

    @now.setter
    def now(self, seconds: float) -> None:
        self._now = seconds

    def time(self) -> float:
        """Return the current machine's time, which stands still while that machine sleeps."""
        machine = _MACHINE.get()
        return self._now if machine is None else self._now - machine.slept

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Run a callback in the next iteration, or once its machine resumes."""
        machine = _MACHINE.get() if context is None else context.get(_MACHINE)
        handle = asyncio.Handle(callback, args, self, context)
        if machine is None or not machine.blocked:
            self._ready.append(handle)
        else:
            machine.postpone_callback(handle)
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Run a callback in the next iteration, since a simulation has only one thread."""
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback once the `time()` of its machine reaches `when`."""
        machine = _MACHINE.get() if context is None else context.get(_MACHINE)
        when += 0.0 if machine is None else machine.slept
        when = max(when, self._now + INSTANT_SECONDS)
        timer = _MachineTimer(when, machine, callback, args, self, context)
        self.push_timer(timer)
        return timer

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Call a function after a short delay, or never if it is for the default executor.

        Code of users can occupy the threads of the default executor, so a pool must not need it.
        """
        future: asyncio.Future[T] = self.create_future()

        def call_function_and_set_result() -> None:
            if not future.done():
                future.set_result(func(*args))

        if executor is not None:
            self.call_later(THREAD_SECONDS, call_function_and_set_result)
        return future

    def push_timer(self, timer: asyncio.TimerHandle) -> None:
        """Add a timer to the loop's heap, for the first time or with a new time."""
        heapq.heappush(self._scheduled, timer)
        scheduled: Any = timer
        scheduled._scheduled = True

    def run_postponed_callback(self, handle: asyncio.Handle) -> None:
        """Run a callback that its machine postponed during a halt."""
        if not handle.cancelled():
            self._ready.append(handle)


def run_machines(main: Callable[[], Any]) -> Any:
    """Run `main()` on a `MultiMachineLoop`. Once `main()` has ended, cancel all other tasks."""
    with asyncio.Runner(loop_factory=MultiMachineLoop) as runner:
        return runner.run(main())
