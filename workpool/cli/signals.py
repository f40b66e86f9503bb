"""SIGTERM and SIGINT as events on a loop, and the former handlers back at the end.

The first asks for an end, the second for an end now; what that means is the command's to say.
"""

import asyncio
import contextlib
import signal
from types import FrameType, TracebackType
from typing import Any, Final, Self

ENDING: Final = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """A context on the running loop, in the main thread.

    Args:
        watched: What counts.

    Attributes:
        first: Set by the first signal.
        second: Set by the second one.
        last: The signal that came last; None before the first.
    """

    def __init__(self, watched: tuple[signal.Signals, ...] = ENDING) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.last: signal.Signals | None = None
        self._watched = watched
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for each in self._watched:
            self._former[each] = signal.getsignal(each)
            try:
                self._loop.add_signal_handler(each, self._came, each)
            except NotImplementedError:  # Windows
                signal.signal(each, self._came_anywhere)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each, former in self._former.items():
            with contextlib.suppress(NotImplementedError):  # Windows
                self._loop.remove_signal_handler(each)
            signal.signal(each, former)

    def _came(self, each: signal.Signals) -> None:
        (self.second if self.first.is_set() else self.first).set()
        self.last = each

    def _came_anywhere(self, number: int, _: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._came, signal.Signals(number))
