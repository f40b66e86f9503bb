"""Process signals become asyncio events; at the end, the former signal handlers are restored."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.unit.event_loops import LOOP_FACTORIES
from workpool.cli.log_config import log
from workpool.cli.signal_recorder import SignalRecorder
from workpool.cli.signals import SignalEvents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def assert_signal_handlers_are_restored() -> Iterator[None]:
    """Check that every former signal handler is restored."""
    before = [signal.getsignal(each) for each in WATCHED]
    yield
    assert [signal.getsignal(each) for each in WATCHED] == before


def send_signal(number: signal.Signals) -> None:
    """Send the signal from another thread, so that only the signal itself can wake the loop."""
    sender = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, number))
    sender.start()


async def wait_for_both_signals() -> None:
    async with asyncio.timeout(20):
        with SignalEvents() as signals:
            assert not signals.first.is_set()
            send_signal(signal.SIGTERM)
            await signals.first.wait()
            assert not signals.second.is_set()
            send_signal(signal.SIGINT)
            await signals.second.wait()
            assert signals.last is signal.SIGINT


@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_first_and_second_signal_each_wake_event_loop_that_is_waiting(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(wait_for_both_signals())


async def test_signals_are_received_if_event_loop_cannot_install_signal_handlers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse_to_install_signal_handler(*_: object) -> NoReturn:
        raise NotImplementedError

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "add_signal_handler", refuse_to_install_signal_handler)
    monkeypatch.setattr(loop, "remove_signal_handler", refuse_to_install_signal_handler)
    async with asyncio.timeout(20):
        with SignalEvents() as signals:
            signal.raise_signal(signal.SIGTERM)
            await signals.first.wait()
            assert signals.last is signal.SIGTERM


async def test_signal_before_start_of_event_loop_counts_as_first_signal(
    signal_recorder: SignalRecorder,
) -> None:
    signal.raise_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        with SignalEvents() as signals:
            await signals.first.wait()
            assert not signals.second.is_set()
    assert signal_recorder.received == [signal.SIGTERM]


@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_signal_received_while_event_loop_starts_counts_once(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    signal_recorder: SignalRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def raise_and_receive_signal() -> None:
        signal.raise_signal(signal.SIGTERM)
        with SignalEvents() as signals:
            await signals.first.wait()
            reported = asyncio.Event()
            monkeypatch.setattr(log, "warning", lambda *_, **__: reported.set())
            signal.raise_signal(signal.SIGUSR1)
            await reported.wait()
            assert not signals.second.is_set()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asyncio.wait_for(raise_and_receive_signal(), 20))
    assert signal_recorder.received == [signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("hung_up", [True, False])
@pytest.mark.parametrize("hangup_ends", [True, False])
async def test_sighup_counts_as_shutdown_signal_only_after_terminal_was_lost(
    signal_recorder: SignalRecorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    hung_up: bool,
    hangup_ends: bool,
) -> None:
    monkeypatch.setattr(signal_recorder, "has_lost_terminal", lambda: hung_up)
    async with asyncio.timeout(20):
        with SignalEvents(hangup_ends=hangup_ends) as signals:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            # The event loop delivers the signals to `SignalEvents` when it runs next.
            await asyncio.sleep(0)
            assert signals.first.is_set() is (hung_up and hangup_ends)
            assert not signals.second.is_set()
    assert len(caplog.messages) == (0 if hung_up and hangup_ends else 2)


def test_sighup_is_still_ignored_if_it_was_ignored_at_start() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        former = SignalRecorder().install_handlers()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number, handler in former.items():
            signal.signal(number, handler)
    finally:
        signal.signal(signal.SIGHUP, before)
