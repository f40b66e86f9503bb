"""An event loop with virtual time, on which a day of waiting takes no time.

The loop's clock stops while a task runs, and jumps to the next timer when all tasks wait, so a test
is as fast as its work and the same on every machine. It works for code that waits for timers
and for other code on the same loop. A thread, a process or a socket takes real time: if a task
waits for one, the clock does not jump, and an error names the thread, process or socket.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import selectors
import socket
import threading
import weakref
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from concurrent.futures import Executor

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CLEANUP_SECONDS = 1.0
"""After an error, the real time that the loop waits before each jump, for the clean-up of tasks."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` starts at 0 and moves only while all tasks wait.

    Attributes:
        slept: Seconds for which the simulated computer was suspended so far. As on a real
            computer, the loop's clock and timers stood still, but `machine_time` advanced.
        paused: Seconds for which the simulated virtual machine was paused so far: only
            `wall_time` advanced.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self.slept = self.paused = 0.0
        self._real_time_resources = _RealTimeResources()
        self._jumping_selector = _JumpingSelector(self._advance_to_next_timer)
        super().__init__(self._jumping_selector)
        self._own_files = {key.fd for key in self._jumping_selector.get_map().values()}
        # asyncio runs a timer if it is due within this many seconds. After a month of virtual
        # time, the default (1e-9) is less than the precision of a float: no timer would ever run.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Return the virtual seconds since the loop's start, without suspensions and pauses."""
        return self._now

    def machine_time(self) -> float:
        """Return the virtual seconds including suspensions of the computer, as CLOCK_BOOTTIME does.

        Leases use this clock.
        """
        return self._now + self.slept

    def wall_time(self) -> float:
        """Return the virtual seconds since the start of the loop, as a wall clock counts them.

        A wall clock also counts the time in which the computer was suspended or its virtual
        machine was paused.
        """
        return self.machine_time() + self.paused

    def pause(self, seconds: float) -> None:
        """Simulate a pause of the virtual machine: only `wall_time` advances, by `seconds`."""
        self.paused += seconds

    def suspend(self, seconds: float) -> None:
        """Simulate a suspended computer: `machine_time` and `wall_time` advance by `seconds`."""
        self.slept += seconds

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Call a function on a thread, and record that a task may wait for the thread."""
        future = super().run_in_executor(executor, func, *args)
        self._real_time_resources.threads[future] = _function_name(func)
        future.add_done_callback(self._real_time_resources.threads.pop)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Shut the default executor down without waiting for its threads.

        A wait would take real time.
        """
        del timeout
        executor: Executor | None = getattr(self, "_default_executor", None)
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        """Start a process, and record that a task may wait for the process."""
        transport, protocol = await super().subprocess_exec(*args, **kwargs)
        self._real_time_resources.processes[transport] = os.fsdecode(args[1])
        return transport, protocol

    async def subprocess_shell(self, *args: Any, **kwargs: Any) -> Any:
        """Start a shell, and record that a task may wait for the shell."""
        transport, protocol = await super().subprocess_shell(*args, **kwargs)
        self._real_time_resources.processes[transport] = "shell"
        return transport, protocol

    def _advance_to_next_timer(self, seconds: float | None) -> None:
        """Advance the clock by `seconds` to the next timer; None means that no timer is set.

        Raises:
            RuntimeError: A task may wait for something that takes real time, or nothing can happen
                anymore.
        """
        files = [
            key.fd
            for key in self._jumping_selector.get_map().values()
            if key.fd not in self._own_files
        ]
        if self._real_time_resources.threads or self._real_time_resources.processes or files:
            resources = self._real_time_resources.describe_resources(files)
            if resources and not self._jumping_selector.real_seconds:
                self._jumping_selector.real_seconds = CLEANUP_SECONDS
                raise RuntimeError(f"virtual time cannot wait for {', '.join(resources)}")
        if seconds is None:
            # Without a timer, no task can ever continue: the test would hang without this error.
            raise RuntimeError(f"every task waits, and no timer is set{_describe_other_threads()}")
        self._now += seconds


class _RealTimeResources:
    """The threads and processes that tasks of one loop may wait for, which takes real time."""

    def __init__(self) -> None:
        self.threads: dict[asyncio.Future[Any], str] = {}
        self.processes: weakref.WeakKeyDictionary[asyncio.SubprocessTransport, str] = (
            weakref.WeakKeyDictionary()
        )

    def describe_resources(self, files: Iterable[int]) -> list[str]:
        """Describe the threads, the processes, and the sockets among the file descriptors `files`.

        The descriptions are part of an error message.
        """
        names = [f"the thread of {name}" for name in self.threads.values()]
        names += [
            f"process {transport.get_pid()} ({name})"
            for transport, name in self.processes.items()
            if transport.get_returncode() is None
        ]
        return names + [name for file in files if (name := _describe_socket(file))]


def _function_name(func: Any) -> str:
    """Return the name of the function that an executor runs.

    `asyncio.to_thread` wraps the function in partials; the name is that of the inner function.
    """
    while isinstance(func, functools.partial):
        in_context = isinstance(getattr(func.func, "__self__", None), contextvars.Context)
        func = func.args[0] if in_context else func.func
    return str(getattr(func, "__qualname__", type(func).__qualname__))


def _describe_socket(file: int) -> str | None:
    """Describe the socket of a file descriptor; return None if it is not a socket."""
    try:
        copy = socket.socket(fileno=os.dup(file))
    except OSError:
        return None
    with copy:
        try:
            return f"the socket connected to {_format_address(copy.getpeername())}"
        except OSError:
            return f"the socket {_format_address(copy.getsockname())}"


def _format_address(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else repr(address)


def _describe_other_threads() -> str:
    names = [each.name for each in threading.enumerate() if each is not threading.current_thread()]
    return f"; virtual time does not wait for the threads {', '.join(names)}" if names else ""


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that advances virtual time instead of waiting.

    Attributes:
        real_seconds: The real seconds for which `select` waits before each jump; 0 until the test
            fails.
    """

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self.real_seconds = 0.0
        self._advance_to_next_timer = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0 if timeout == 0 else self.real_seconds)
        if not ready and timeout != 0:
            self._advance_to_next_timer(timeout)
        return ready


def run_on_virtual_loop(main: Coroutine[object, object, T]) -> T:
    """Run `main` in virtual time, as `asyncio.run` does in real time.

    Raises:
        RuntimeError: `main` waits for a thread, a process, a socket, or an event that no task sets.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def in_virtual_time(test: Callable[P, Coroutine[object, object, T]]) -> Callable[P, T]:
    """Decorate an `async def` test, so that it runs in virtual time."""

    @functools.wraps(test)
    def run_test_in_virtual_time(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_on_virtual_loop(test(*args, **kwargs))

    return run_test_in_virtual_time
