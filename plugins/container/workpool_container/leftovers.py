"""The removal of leftover containers, whose results cannot count anymore.

There is a sweep at start, every `sweep_seconds`, after each session, and at the end. Several
workers may share an engine, each with its own sweeps, so the state of the item at the control plane
decides whether a container is removed. A container that may still be adopted is kept.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from workpool.errors import ControlPlaneError
from workpool_container.engine import EngineError
from workpool_container.options import ENVIRONMENT_ID, WORK_ID
from workpool_container.run import CONTAINER

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from workpool import WorkClient
    from workpool_container.engine import Engine, Found

log = logging.getLogger(__name__)

NOT_FOUND = 404


class Leftovers:
    """Sweeps the containers of one environment on one engine.

    Attributes:
        look: Set to request a sweep now.
    """

    def __init__(
        self, engine: Engine, client: WorkClient, environment_id: str, here: AbstractSet[str]
    ) -> None:
        """Sweep nothing yet; `here`: the ids of the items whose handlers run in this process."""
        self.look = asyncio.Event()
        self._engine = engine
        self._client = client
        self._environment_id = environment_id
        self._here = here
        self._unknown: set[str] = set()

    async def keep_sweeping(self, seconds: float) -> None:
        """Sweep now, after each request, and at least every `seconds`, until cancelled."""
        while True:
            await self.sweep()
            try:
                async with asyncio.timeout(seconds):
                    await self.look.wait()
            except TimeoutError:
                pass

    async def sweep(self) -> None:
        """Remove leftover containers. A removal that fails is tried again at the next sweep."""
        self.look.clear()
        try:
            # The containers are listed before the items are read: the metadata of an item name a
            # container before it starts, so they name each container that is listed as started.
            for found in await self._engine.containers(ENVIRONMENT_ID, self._environment_id):
                if found.labels[WORK_ID] not in self._here:
                    await self._remove_if_leftover(found)
        except (EngineError, ControlPlaneError) as error:
            log.warning(
                "leftover containers not looked after: %s", error, extra={"error": str(error)}
            )

    async def _remove_if_leftover(self, found: Found) -> None:
        reason = "given up" if found.ended else await self._leftover_reason(found)
        if reason is None:
            return
        try:
            await self._engine.remove(found.id)
        except EngineError as error:
            # One container that cannot be removed must not prevent the removal of the others.
            log.warning(
                "container not removed: %s",
                error,
                extra={"container": found.name, "error": str(error)},
            )
        else:
            log.info(
                "container removed",
                extra={
                    "container": found.name,
                    "container_id": found.id[:12],
                    "reason": reason,
                },
            )

    async def _leftover_reason(self, found: Found) -> str | None:
        """Return the reason why the container's result cannot count anymore; None if it can."""
        try:
            item = await self._client.get(found.labels[WORK_ID])
        except ControlPlaneError as error:
            if error.status != NOT_FOUND:
                raise
            if found.id not in self._unknown:  # perhaps an item of another control plane
                self._unknown.add(found.id)
                log.warning(
                    "container left alone: the control plane does not know its item",
                    extra={"container": found.name},
                )
            return None
        if item.state == "stopped":
            return "its item is stopped"
        named = item.metadata.get(CONTAINER)
        if found.started and named is not None and named != found.id:
            return f"superseded by {named:.12}"
        return None
