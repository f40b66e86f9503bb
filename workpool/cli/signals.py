"""Turns signals of the process into asyncio events.

The first SIGTERM or SIGINT requests an end, the second one an immediate end; the command defines
both. SIGHUP requests an end if the terminal hung up. The command defines the effects of SIGUSR1 and
SIGUSR2. A signal without effect is logged. See workpool/docs/cli.md, "Signals".
"""

import asyncio
import contextlib
import functools
import signal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from workpool.cli.log_config import log
from workpool.cli.signal_recorder import ENDING, HANGUP, USER, SignalRecorder

if TYPE_CHECKING:
    from collections.abc import Callable


class SignalEvents:
    """A context, on the main thread, in which signals set asyncio events.

    Signals that came before the context count too. The end of the context restores the former
    handlers. Until the loop runs, a second SIGTERM or SIGINT ends the process, since code that
    blocks the loop would prevent the end of the command.

    Args:
        hangup_ends: Whether the hangup of the terminal requests an end.

    Attributes:
        first: Set by the first signal that requests an end.
        second: Set by a SIGTERM or SIGINT after it.
        last: The last signal that set `first` or `second`; None before the first signal.
        on_user: Called with each SIGUSR1 and SIGUSR2; None: they have no effect.
    """

    def __init__(self, *, hangup_ends: bool = True) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.last: signal.Signals | None = None
        self.on_user: Callable[[signal.Signals], None] | None = None
        self._hangup_ends = hangup_ends
        self._handled = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        standing = signal.getsignal(signal.SIGTERM)
        self._recorder = standing if isinstance(standing, SignalRecorder) else SignalRecorder()
        self._former = self._recorder.install_handlers()
        self._start_handle = self._loop.call_soon(self._start_listening)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._start_handle.cancel()
        self._recorder.listener = None
        for each in USER[:1]:
            with contextlib.suppress(NotImplementedError):
                self._loop.remove_signal_handler(each)
        for each, former in self._former.items():
            signal.signal(each, former)

    def _start_listening(self) -> None:
        # Without a call of `add_signal_handler`, asyncio's Unix loop does not wake up when a signal
        # arrives. The call replaces `_recorder` as the signal's handler, and `signal.signal`
        # installs `_recorder` again. If the signal arrives between these two calls, it is lost, so
        # use SIGUSR1, whose loss is harmless.
        for each in USER[:1]:
            with contextlib.suppress(NotImplementedError):
                self._loop.add_signal_handler(each, self._handle_signals)
            signal.signal(each, self._recorder)
        self._recorder.listener = functools.partial(
            self._loop.call_soon_threadsafe, self._handle_signals
        )
        self._handle_signals()

    def _handle_signals(self) -> None:
        """Handle the signals that arrived since the last call of this method."""
        received = self._recorder.received[self._handled :]
        self._handled += len(received)
        for each in received:
            if each in ENDING or (each in HANGUP and self._should_end_on_hangup()):
                self._record_end_request(each)
            elif each in USER and self.on_user is not None:
                self.on_user(each)
            else:
                log.warning("signal has no effect", extra={"signal": each.name})

    def _should_end_on_hangup(self) -> bool:
        return self._hangup_ends and self._recorder.has_lost_terminal()

    def _record_end_request(self, each: signal.Signals) -> None:
        if self.first.is_set():
            # Ignore a second SIGHUP: when the terminal closes, the shell and the kernel each send
            # one SIGHUP.
            if each in HANGUP:
                return
            self.second.set()
        self.first.set()
        self.last = each
