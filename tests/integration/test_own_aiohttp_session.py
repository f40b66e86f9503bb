"""Aiohttp sessions of the caller, made by `connect=` on each event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from workpool import Session, Settings, Supervisor, WorkClient, handler
from workpool.events import HeartbeatFinished, SessionFinished

if TYPE_CHECKING:
    from workpool.server import ControlPlane
    from workpool.testing import Recorder

RENEWALS = 5


class ClientWithOwnHttpSession(WorkClient):
    """A client that uses an aiohttp session of the caller."""

    def __init__(self, settings: Settings) -> None:
        self.made_on = asyncio.get_running_loop()
        self.thread = threading.current_thread().name
        self.http = aiohttp.ClientSession()
        super().__init__(settings, session=self.http)

    async def __aexit__(self, *error: Any) -> None:
        await super().__aexit__(*error)
        assert not self.http.closed
        await self.http.close()

    async def heartbeat(self, *arguments: Any, **options: Any) -> Any:
        assert asyncio.get_running_loop() is self.made_on
        return await super().heartbeat(*arguments, **options)


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_leases_are_renewed_through_aiohttp_sessions_of_the_caller(
    control_plane: ControlPlane, make_settings: Any, recorder: Recorder
) -> None:
    clients: list[ClientWithOwnHttpSession] = []
    renewed = asyncio.Event()

    def connect(settings: Settings) -> ClientWithOwnHttpSession:
        clients.append(ClientWithOwnHttpSession(settings))
        return clients[-1]

    @handler
    async def wait_for_renewals(_: Session) -> dict[str, str]:
        await renewed.wait()
        return {"done": "yes"}

    (item,) = control_plane.enqueue()
    pool = Supervisor(make_settings(), plugins=[wait_for_renewals, recorder], connect=connect)
    async with pool:
        # The first heartbeat is sent on the handlers' loop, and the others on the renewer's loop.
        await recorder.wait_for(HeartbeatFinished, count=1 + RENEWALS)
        renewed.set()
        finished = await recorder.wait_for(SessionFinished)
    assert {event.result for event in recorder.of(HeartbeatFinished)} == {"ok"}
    assert finished.outcome == "completed"
    assert (
        control_plane.operations.get_item(control_plane.environments[0], item.id).metadata["done"]
        == "yes"
    )
    assert [client.thread for client in clients] == [
        threading.current_thread().name,
        "workpool-lease-renewer",
    ]
    assert clients[0].made_on is not clients[1].made_on
