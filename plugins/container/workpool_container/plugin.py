"""The plugin class `Container`: its handler, its sweeper, and its checks at the start of a pool.

The start of the pool fails without an engine or an image, so that the worker claims no sessions
that only other workers can run.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workpool import (
    PluginError,
    Session,
    Supervisor,
    WorkClient,
    handler,
    hookimpl,
    release_on_exhaustion,
)
from workpool_container.container_run import ContainerRun
from workpool_container.engine_client import EngineClient, EngineError, find_socket
from workpool_container.leftover_sweeper import LeftoverSweeper
from workpool_container.options import ContainerOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool import Settings
    from workpool.events import SessionFinished

log = logging.getLogger(__name__)


class Container:
    """Runs a container for each session. The keywords are the settings of the plugin.

    Raises:
        ValueError: Some settings are wrong. The text names each of them.
    """

    _engine: EngineClient
    """The client of the engine, which exists as long as the pool runs."""
    _settings: Settings
    """The settings of the pool, which exist as long as the pool runs."""

    def __init__(self, **settings: Any) -> None:
        self._options = ContainerOptions.from_settings(settings)
        self._running_item_ids: set[str] = set()
        self._sweeper: LeftoverSweeper | None = None

        async def session(session: Session) -> dict[str, str]:
            return await self._run_session(session)

        self.session = handler(
            metadata=self._options.metadata,
            timeout=self._options.timeout,
            max_sessions=self._options.max_sessions,
            stall_timeout=self._options.stall_timeout,
        )(session)

    @hookimpl
    @asynccontextmanager
    async def workpool_lifespan(self, supervisor: Supervisor) -> AsyncIterator[None]:
        """Connect to the engine, and remove leftover containers while the pool runs."""
        settings = supervisor.settings
        for file in (settings.token_file, settings.api_key_file):
            if file is not None:
                self._reject_mounts_of_token_file(Path(file))
        self._settings = settings
        socket = find_socket(self._options.socket)
        async with EngineClient(socket) as engine, WorkClient(settings) as client:
            await self._ensure_engine_has_image(engine)
            self._engine = engine
            sweeper = LeftoverSweeper(
                engine, client, settings.environment_id or "", self._running_item_ids
            )
            async with asyncio.TaskGroup() as group:
                sweeping = group.create_task(
                    sweeper.remove_leftover_containers_repeatedly(self._options.sweep_seconds),
                    name="container-sweep",
                )
                self._sweeper = sweeper
                try:
                    yield
                finally:
                    self._sweeper = None
                    sweeping.cancel()
            # Sweep once more, because sessions may have ended since the last sweep of the task
            # `sweeping`.
            await sweeper.remove_leftover_containers()

    @hookimpl
    def workpool_event(self, event: SessionFinished) -> None:
        """Request a sweep, because the ended session may have left a container behind."""
        del event
        if self._sweeper is not None:
            self._sweeper.sweep_requested.set()

    async def _run_session(self, session: Session) -> dict[str, str]:
        work_id = session.item.id
        self._running_item_ids.add(work_id)
        try:
            with release_on_exhaustion():
                options, extra_variables = self._options, dict[str, str]()
                if options.item_token:
                    extra_variables = self._settings.item_token_variables(session.item)
                reads_all_output = (
                    options.stall_timeout or self._settings.stall_timeout
                ) is not None
                run = ContainerRun(
                    self._engine,
                    options,
                    session,
                    extra_variables,
                    reads_all_output=reads_all_output,
                )
                return await run.run_container()
        finally:
            self._running_item_ids.discard(work_id)

    def _reject_mounts_of_token_file(self, token_file: Path) -> None:
        """Raise an error if a mount would show the worker's token file to a container."""
        token = Path(os.path.realpath(token_file))
        for mount in self._options.mounts:
            source = mount.partition(":")[0]
            if source.startswith("/") and token.is_relative_to(os.path.realpath(source)):
                raise PluginError("container", f"mount {mount}: shows the token file {token_file}")

    async def _ensure_engine_has_image(self, engine: EngineClient) -> None:
        """Check that the engine answers and has the image. Pull a missing image if this is allowed.

        Raises:
            PluginError: The engine or the image is missing. The text names the solution.
        """
        socket, image = engine.socket, self._options.image
        try:
            version = await engine.negotiate_api_version()
        except EngineError as error:
            raise PluginError(
                "container",
                f"no container engine answers at {socket} ({error}); start Docker, or Podman's "
                "socket (systemctl start podman.socket), or set `socket`",
            ) from error
        try:
            present = await engine.has_image(image)
            if not present and self._options.pull == "missing":
                await engine.pull_image(image)
                present = True
        except EngineError as error:
            raise PluginError("container", f"image {image} cannot be pulled: {error}") from error
        if not present:
            raise PluginError(
                "container",
                f"image {image} is not on the engine at {socket}; pull it, or set pull = 'missing'",
            )
        log.info(
            "container engine ready",
            extra={"socket": str(socket), "engine": str(version), "image": image},
        )
