"""The plugin: its settings, its connection to the engine, and the handler.

The start fails without an engine or an image: a worker that claims sessions and cannot run them
would take them from workers that can.
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
from workpool_container.engine import Engine, EngineError, find_socket
from workpool_container.leftovers import Leftovers
from workpool_container.options import Options
from workpool_container.run import Run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool import Settings
    from workpool.events import SessionFinished

log = logging.getLogger(__name__)


class Container:
    """Runs a container for each session. The keywords are the settings of the plugin.

    Raises:
        ValueError: Some settings are wrong. Names all of them.
    """

    _engine: Engine
    """The connection to the engine, during the lifetime of the pool."""
    _settings: Settings
    """The settings of the pool, during its lifetime."""

    def __init__(self, **settings: Any) -> None:
        self._options = Options.read(settings)
        self._here: set[str] = set()
        self._leftovers: Leftovers | None = None

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
        """Connect to the engine, and sweep leftover containers during the lifetime of the pool."""
        settings = supervisor.settings
        for file in (settings.token_file, settings.api_key_file):
            if file is not None:
                self._check_mounts(Path(file))
        self._settings = settings
        socket = find_socket(self._options.socket)
        async with Engine(socket) as engine, WorkClient(settings) as client:
            await self._check_engine(engine)
            self._engine = engine
            leftovers = Leftovers(engine, client, settings.environment_id or "", self._here)
            async with asyncio.TaskGroup() as group:
                sweeping = group.create_task(
                    leftovers.keep_sweeping(self._options.sweep_seconds), name="container-sweep"
                )
                self._leftovers = leftovers
                try:
                    yield
                finally:
                    self._leftovers = None
                    sweeping.cancel()
            await leftovers.sweep()  # removes the containers of the last sessions

    @hookimpl
    def workpool_event(self, event: SessionFinished) -> None:
        """Request a sweep after a session, whose container is not needed anymore."""
        del event
        if self._leftovers is not None:
            self._leftovers.look.set()

    async def _run_session(self, session: Session) -> dict[str, str]:
        work_id = session.item.id
        self._here.add(work_id)
        try:
            with release_on_exhaustion():
                options, given = self._options, dict[str, str]()
                if options.item_token:
                    given = self._settings.item_token_variables(session.item)
                watched = (options.stall_timeout or self._settings.stall_timeout) is not None
                run = Run(self._engine, options, session, given, watched=watched)
                return await run.complete()
        finally:
            self._here.discard(work_id)

    def _check_mounts(self, token_file: Path) -> None:
        """Refuse mounts that would show the worker's token to a container."""
        token = Path(os.path.realpath(token_file))
        for mount in self._options.mounts:
            source = mount.partition(":")[0]
            if source.startswith("/") and token.is_relative_to(os.path.realpath(source)):
                raise PluginError("container", f"mount {mount}: shows the token file {token_file}")

    async def _check_engine(self, engine: Engine) -> None:
        """Find the engine and the image.

        Raises:
            PluginError: One of them is missing. The text says how to add it.
        """
        socket, image = engine.socket, self._options.image
        try:
            version = await engine.greet()
        except EngineError as error:
            raise PluginError(
                "container",
                f"no container engine answers at {socket} ({error}); start Docker, or Podman's "
                "socket (systemctl start podman.socket), or set `socket`",
            ) from error
        try:
            present = await engine.has_image(image)
            if not present and self._options.pull == "missing":
                await engine.pull(image)
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
