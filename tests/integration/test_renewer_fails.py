"""A lease renewer that cannot start or fails ends the pool, because leases need renewal."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, handler
from workpool.errors import LeaseRenewerError, ListenError
from workpool.events import SessionFinished, SessionStarted
from workpool.pool.lease_renewer import LeaseRenewer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder


@pytest.fixture(autouse=True)
def no_renewer_left() -> Iterator[None]:
    yield
    assert not [each for each in threading.enumerate() if each.name.startswith("workpool-lease")]


@handler
async def endless_handler(_: Session) -> None:
    await asyncio.Event().wait()


async def test_failed_lease_renewer_is_fatal_and_sends_nothing_more(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (item,) = control_plane.enqueue()

    def crash_renewer(_: LeaseRenewer) -> float:
        raise ZeroDivisionError("a bug of the lease renewer")

    async with make_pool(endless_handler) as supervisor:
        await recorder.wait_for(SessionStarted)
        monkeypatch.setattr(LeaseRenewer, "_look", crash_renewer)
        finished = await recorder.wait_for(SessionFinished)
        assert finished.outcome == "lease_lost"
        with pytest.raises(LeaseRenewerError) as caught:
            await supervisor.wait()
    assert caught.value.__cause__ is not None
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack", "heartbeat"]
    assert (
        control_plane.operations.get_item(control_plane.environments[0], item.id).state == "active"
    )


async def test_address_in_use_is_error_at_start_and_leaves_no_request(
    control_plane: ControlPlane, faults: Faults, make_pool: Any
) -> None:
    control_plane.enqueue()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=str(port)):
            await make_pool(endless_handler, metrics_listen=f"127.0.0.1:{port}").__aenter__()
    assert not faults.seen
