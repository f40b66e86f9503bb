"""Removes leftover containers: containers whose exit status no session needs anymore.

There is a sweep at start, every `sweep_seconds`, after each session, and at the end. Several
workers may share an engine, each with its own sweeps, so the state of the item at the control plane
decides whether a container is removed. A container that a worker may still adopt is kept.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from workpool.errors import ControlPlaneError
from workpool_container.container_run import CONTAINER_ID_KEY
from workpool_container.engine_client import EngineError
from workpool_container.options import ENVIRONMENT_ID_LABEL, WORK_ID_LABEL

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from workpool import WorkClient
    from workpool_container.engine_client import EngineClient, ListedContainer

log = logging.getLogger(__name__)

NOT_FOUND = 404


class LeftoverSweeper:
    """Removes the leftover containers of one environment on one engine.

    Attributes:
        sweep_requested: Set to request a sweep now.
    """

    def __init__(
        self,
        engine: EngineClient,
        client: WorkClient,
        environment_id: str,
        running_item_ids: AbstractSet[str],
    ) -> None:
        """Create a sweeper. It keeps the containers of the items in `running_item_ids`.

        Args:
            engine: The engine.
            client: The client that reads the items.
            environment_id: The environment whose containers are examined.
            running_item_ids: The items whose handlers run in this process; may change later.
        """
        self.sweep_requested = asyncio.Event()
        self._engine = engine
        self._client = client
        self._environment_id = environment_id
        self._running_item_ids = running_item_ids
        self._containers_of_unknown_items: set[str] = set()

    async def remove_leftover_containers_repeatedly(self, seconds: float) -> None:
        """Remove leftover containers now, at each `sweep_requested`, and every `seconds`.

        The loop runs until it is cancelled.
        """
        while True:
            await self.remove_leftover_containers()
            try:
                async with asyncio.timeout(seconds):
                    await self.sweep_requested.wait()
            except TimeoutError:
                pass

    async def remove_leftover_containers(self) -> None:
        """Remove all leftover containers. The next sweep tries a failed removal again."""
        self.sweep_requested.clear()
        try:
            # List the containers before reading the items. A worker writes the id of a container to
            # the item's metadata before it starts the container. Metadata that were read before the
            # list could name an older container, and the new container would be removed.
            for listed in await self._engine.list_containers(
                ENVIRONMENT_ID_LABEL, self._environment_id
            ):
                if listed.labels[WORK_ID_LABEL] not in self._running_item_ids:
                    await self._remove_if_leftover(listed)
        except (EngineError, ControlPlaneError) as error:
            log.warning("leftover containers not examined: %s", error, extra={"error": str(error)})

    async def _remove_if_leftover(self, listed: ListedContainer) -> None:
        reason = (
            "given up" if listed.is_marked_for_removal else await self._reason_for_removal(listed)
        )
        if reason is None:
            return
        try:
            await self._engine.remove_container(listed.id)
        except EngineError as error:
            # A container that cannot be removed must not prevent the removal of the others.
            log.warning(
                "container not removed: %s",
                error,
                extra={"container": listed.name, "error": str(error)},
            )
        else:
            log.info(
                "container removed",
                extra={
                    "container": listed.name,
                    "container_id": listed.id[:12],
                    "reason": reason,
                },
            )

    async def _reason_for_removal(self, listed: ListedContainer) -> str | None:
        """Return why the container is a leftover, or None if a worker may still adopt it."""
        try:
            item = await self._client.get(listed.labels[WORK_ID_LABEL])
        except ControlPlaneError as error:
            if error.status != NOT_FOUND:
                raise
            # Keep the container, because its item may belong to another control plane. Log only one
            # warning.
            if listed.id not in self._containers_of_unknown_items:
                self._containers_of_unknown_items.add(listed.id)
                log.warning(
                    "container left alone: the control plane does not know its item",
                    extra={"container": listed.name},
                )
            return None
        if item.state == "stopped":
            return "its item is stopped"
        named = item.metadata.get(CONTAINER_ID_KEY)
        if listed.was_started and named is not None and named != listed.id:
            return f"superseded by {named:.12}"
        return None
