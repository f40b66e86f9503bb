"""Signals as events, and the former handlers back at the end."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, NoReturn

from workpool.cli.signals import Signals

if TYPE_CHECKING:
    import pytest


async def test_the_first_and_the_second_and_then_as_before() -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    async with asyncio.timeout(20):
        with Signals() as signals:
            assert not signals.first.is_set()
            signal.raise_signal(signal.SIGTERM)
            await signals.first.wait()
            assert not signals.second.is_set()
            signal.raise_signal(signal.SIGINT)
            await signals.second.wait()
            assert signals.last is signal.SIGINT
    assert {each: signal.getsignal(each) for each in before} == before


async def test_where_the_loop_has_no_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise NotImplementedError

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "add_signal_handler", refuse)
    monkeypatch.setattr(loop, "remove_signal_handler", refuse)
    before = signal.getsignal(signal.SIGTERM)
    async with asyncio.timeout(20):
        with Signals((signal.SIGTERM,)) as signals:
            signal.raise_signal(signal.SIGTERM)
            await signals.first.wait()
            assert signals.last is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
