"""Records signals until an event loop runs. This module imports nothing slow.

Without a signal handler, a signal has no effect on process 1 and ends any other process without a
drain. So the command line installs a `SignalRecorder` before it imports anything else.
`workpool.cli.signals` then continues with the recorded signals.
"""

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)
HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
USER = (signal.SIGUSR1, signal.SIGUSR2) if hasattr(signal, "SIGUSR1") else ()


class SignalRecorder:
    """A handler of SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 that stores each signal.

    Until there is a listener, a second SIGTERM or SIGINT ends the process with 128 + its number.

    Attributes:
        received: The signals so far, in their order.
        listener: Called on the main thread after each signal.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.listener: Callable[[], object] | None = None
        self._had_terminal = _has_terminal()

    def __call__(self, number: int, _frame: "FrameType | None") -> None:
        """Store the signal and call the listener."""
        self.received.append(signal.Signals(number))
        if self.listener is not None:
            self.listener()
        elif sum(each in ENDING for each in self.received) > 1 and number in ENDING:
            # Do not raise SystemExit: a plugin that is being imported could catch it.
            os._exit(128 + number)

    def install_handlers(self) -> "dict[signal.Signals, Callable[..., object] | int | None]":
        """Install this recorder as the handler of its signals, and return the former handlers.

        SIGHUP stays ignored if it was, as `nohup` demands.
        """
        former = {each: signal.getsignal(each) for each in (*ENDING, *HANGUP, *USER)}
        for each in HANGUP:
            if former[each] is signal.SIG_IGN:
                del former[each]
        for each in former:
            signal.signal(each, self)
        return former

    def has_lost_terminal(self) -> bool:
        """Return whether the process had a controlling terminal and has lost it.

        The kernel takes the terminal away from the whole session before it sends SIGHUP, so a
        SIGHUP while the terminal can be opened was sent by a program (`kill -HUP`).
        """
        return self._had_terminal and not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | getattr(os, "O_NOCTTY", 0)))
    except OSError:
        return False
    return True
