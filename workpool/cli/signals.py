"""Signals as events on a loop, and the former handlers back at the end.

SIGTERM and SIGINT ask for an end, a second one for an end now; the command decides what that means.
SIGHUP asks for an end if the terminal hung up. Any other signal is one log line.
"""

import asyncio
import contextlib
import functools
import signal
from types import TracebackType
from typing import Any, Self

from workpool.cli.logs import log
from workpool.cli.signal_recorder import ENDING, HANGUP, USER, SignalRecorder


class Signals:
    """A context on the running loop, in the main thread.

    It starts with the signals that the process has recorded since its start. Until the loop turns,
    a second SIGTERM or SIGINT ends the process: code that blocks the loop cannot end the command.

    Args:
        hangup_ends: Whether the end of the terminal asks for an end.

    Attributes:
        first: Set by the first signal that asks for an end.
        second: Set by a SIGTERM or SIGINT after it.
        last: The last signal that set one of them; None before the first.
    """

    def __init__(self, *, hangup_ends: bool = True) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.last: signal.Signals | None = None
        self._hangup_ends = hangup_ends
        self._handled = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        standing = signal.getsignal(signal.SIGTERM)
        self._recorder = standing if isinstance(standing, SignalRecorder) else SignalRecorder()
        self._former = self._recorder.install()
        self._turn = self._loop.call_soon(self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turn.cancel()
        self._recorder.listener = None
        for each in USER[:1]:
            with contextlib.suppress(NotImplementedError):
                self._loop.remove_signal_handler(each)
        for each, former in self._former.items():
            signal.signal(each, former)

    def _listen(self) -> None:
        # asyncio's Unix loop is woken by signals once it has a handler for one; uvloop and Windows
        # always are. A signal could be lost between these two lines, so it is one without effect.
        for each in USER[:1]:
            with contextlib.suppress(NotImplementedError):
                self._loop.add_signal_handler(each, self._handle)
            signal.signal(each, self._recorder)
        self._recorder.listener = functools.partial(self._loop.call_soon_threadsafe, self._handle)
        self._handle()

    def _handle(self) -> None:
        """Act on the signals received since the last call."""
        received = self._recorder.received[self._handled :]
        self._handled += len(received)
        for each in received:
            if each in ENDING or (each in HANGUP and self._hangup_asks()):
                self._ask(each)
            else:
                log.warning("signal has no effect signal=%s", each.name)

    def _hangup_asks(self) -> bool:
        return self._hangup_ends and self._recorder.terminal_hung_up()

    def _ask(self, each: signal.Signals) -> None:
        if self.first.is_set():
            if each in HANGUP:  # shell and kernel both send it, for one hangup
                return
            self.second.set()
        self.first.set()
        self.last = each
