"""The client of the container engine, Docker or Podman, with one method for each call.

Every call has a time limit except `exit_of` and `output`, which follow a container that may run for
days. Every failure is an `EngineError`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiodocker
import aiohttp

from workpool import WorkpoolError
from workpool_container.options import WORK_ID

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping
    from typing import Self

log = logging.getLogger(__name__)

CALL_SECONDS: Final = 60.0
"""The bound of a call, in seconds. An engine under load is slow to create and to start."""
WAIT_SECONDS: Final = (0.25, 10.0)
"""Seconds to wait for the report of a container's exit before asking for it, at first and at
most."""
RETRY_SECONDS: Final = (0.2, 1.0, 5.0)
"""The pauses between calls to an engine that does not answer; the last one repeats."""
REMOVAL_TRIES: Final = 5
"""The removals that the engine may fail with status 500 before the error counts."""
PULL_SECONDS: Final = 600.0
ORIGIN: Final = "http://localhost"
"""Any host name will do behind a socket."""
STREAMS: Final = {1: "stdout", 2: "stderr"}
ENDED: Final = "-ended"
"""The suffix of the name of a container that its holder has given up.

See plugins/container/README.md, "Adoption".
"""
_RUNNING: Final = {"running", "paused", "stopping", "restarting"}
_EXITED: Final = {"exited", "stopped", "dead"}


class EngineError(WorkpoolError):
    """The engine refused a call, or did not answer it.

    Attributes:
        status: The HTTP status; None without an answer, when the call may have been carried out.
    """

    def __init__(self, doing: str, problem: str, status: int | None = None) -> None:
        super().__init__(f"{doing}: {problem}")
        self.status = status

    @property
    def absent(self) -> bool:
        """Whether the engine answered that the container or image does not exist."""
        return self.status == HTTPStatus.NOT_FOUND


@dataclass(frozen=True, slots=True)
class Found:
    """A container as the engine lists it."""

    id: str
    name: str
    state: str
    labels: Mapping[str, str]

    @property
    def started(self) -> bool:
        """Whether the container was started."""
        return self.state in _RUNNING or self.state in _EXITED

    @property
    def ended(self) -> bool:
        """Whether its worker has given up the container, so that its exit status does not count."""
        return self.name.endswith(ENDED)


class Engine:
    """A connection to the engine at `socket`. Enter the context, then call `greet` first."""

    def __init__(self, socket: str) -> None:
        self.socket = socket

    async def __aenter__(self) -> Self:
        # No limit: each running container uses two connections, and the call that stops a container
        # must not wait for a free one.
        connector = aiohttp.UnixConnector(self.socket, limit=0)
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=10.0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        self._docker = aiodocker.Docker(
            ORIGIN, connector=connector, session=self._session, timeout=timeout
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._docker.close()
        await self._session.close()

    async def greet(self) -> str:
        """Negotiate the version of the API; return the name and version of the engine."""
        with _engine_errors("asking for its version"):
            async with self._session.get(f"{ORIGIN}/version", raise_for_status=True) as answer:
                found = await answer.json()
        if "ApiVersion" not in found:
            raise EngineError("asking for its version", "it is no container engine")
        self._docker.api_version = f"v{found['ApiVersion']}"
        names = [part["Name"] for part in found.get("Components") or ()]
        return f"{names[0] if names else 'engine'} {found.get('Version')}"

    async def has_image(self, image: str) -> bool:
        """Return whether the engine has the image."""
        try:
            with _engine_errors(f"looking for image {image}"):
                await self._docker.images.inspect(image)
        except EngineError as error:
            if error.absent:
                return False
            raise
        return True

    async def pull(self, image: str) -> None:
        """Let the engine pull the image."""
        log.info("pulling an image", extra={"image": image})
        with _engine_errors(f"pulling image {image}"):
            async with asyncio.timeout(PULL_SECONDS):
                await self._docker.images.pull(image, timeout=None)

    async def containers(self, label: str, value: str) -> list[Found]:
        """Return all containers with this label, in any state."""
        filters = json.dumps({"label": [f"{label}={value}"]})
        with _engine_errors("listing containers"):
            listed = await self._docker.containers.list(all=True, filters=filters)
        return [
            Found(
                each.id,
                str((each["Names"] or [""])[0]).removeprefix("/"),
                str(each["State"]).lower(),
                each["Labels"] or {},
            )
            for each in listed
            if WORK_ID in (each["Labels"] or {})
        ]

    async def create(self, name: str, specification: Mapping[str, Any]) -> str:
        """Create a container without starting it, and return its id."""
        with _engine_errors("creating a container"):
            made = await self._docker.containers.create(dict(specification), name=name)
        return made.id

    async def start(self, container: str) -> None:
        """Start a created container. Not repeated: a second start would run an ended one again."""
        with _engine_errors("starting the container"):
            await self._container_of(container).start()

    async def rename(self, name: str, to: str) -> bool:
        """Rename a container if it still has this name. Of two concurrent calls, one succeeds."""
        try:
            with _engine_errors("renaming the container"):
                await self._container_of(name).rename(to)
        except EngineError as error:
            if error.absent:
                return False
            raise
        return True

    async def stop(self, container: str, grace: float) -> None:
        """Stop a container: the engine sends its stop signal, and SIGKILL after `grace`."""
        with _engine_errors("stopping the container"):
            async with asyncio.timeout(CALL_SECONDS + grace):
                await self._container_of(container).stop(t=math.ceil(grace))

    async def remove(self, container: str) -> None:
        """Remove a container in any state, and wait until it is gone. A running one is killed."""
        with _engine_errors("removing the container"):
            async with asyncio.timeout(CALL_SECONDS):
                tries = 1
                while not await self._try_remove(container, last=tries >= REMOVAL_TRIES):
                    tries += 1
                    await asyncio.sleep(RETRY_SECONDS[0])

    async def _try_remove(self, container: str, *, last: bool) -> bool:
        try:
            await self._container_of(container).delete(force=True, v=True)
        except aiodocker.DockerError as error:
            if error.status == HTTPStatus.CONFLICT:
                return False  # Docker: a removal is in progress, perhaps of an earlier call
            if error.status == HTTPStatus.INTERNAL_SERVER_ERROR and not last:
                return False  # Podman: a cancelled stop still changes the container's state
            if error.status != HTTPStatus.NOT_FOUND:
                raise
        return True

    async def exit_of(self, container: str) -> int:
        """Wait for the exit status without a bound, also through restarts of the engine.

        Raises:
            EngineError: The container does not exist anymore.
        """
        failures, patience = 0, WAIT_SECONDS[0]
        while True:
            try:
                status = await self._status(container)
                if status is not None:
                    return status
                await self._wait_for_exit(container, patience)
                failures, patience = 0, min(2 * patience, WAIT_SECONDS[1])
            except EngineError as error:
                if error.absent:
                    raise
                # The container may still run, and the pool still extends the lease of its item.
                log.warning(
                    "container not reached: %s",
                    error,
                    extra={"container_id": container[:12], "error": str(error)},
                )
                await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
                failures += 1

    async def _status(self, container: str) -> int | None:
        """Return the exit status; None unless the container has exited.

        The state is checked, since a container that is being removed may have the status 0.
        """
        with _engine_errors("looking at the container"):
            state = (await self._container_of(container).show())["State"]
        return int(state["ExitCode"]) if str(state["Status"]).lower() in _EXITED else None

    async def _wait_for_exit(self, container: str, patience: float) -> None:
        """Wait for an exit, at most `patience` seconds; an earlier exit is not reported.

        The condition is `next-exit`: with any other one, Podman uses a whole core.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                with _engine_errors("waiting for the container"):
                    await self._container_of(container).wait(condition="next-exit")

    async def output(self, container: str, tail: str) -> AsyncGenerator[tuple[str, bytes], None]:
        """Yield the output until its end, in pieces with the name of their stream.

        Does not use aiodocker, which leaves the connection open if the reader stops early.

        Args:
            container: The id or name of the container.
            tail: The number of earlier lines, or `all`.
        """
        url = f"{ORIGIN}/{self._docker.api_version}/containers/{container}/logs"
        asked = {"stdout": "1", "stderr": "1", "follow": "1", "tail": tail}
        endless = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
        doing = "reading the container's output"
        with _engine_errors(doing):
            async with self._session.get(url, params=asked, timeout=endless) as response:
                if response.status != HTTPStatus.OK:
                    raise EngineError(doing, response.reason or "refused", response.status)
                with suppress(asyncio.IncompleteReadError):
                    while True:  # a header with the stream and the length, then that many bytes
                        header = await response.content.readexactly(8)
                        piece = await response.content.readexactly(int.from_bytes(header[4:]))
                        yield STREAMS.get(header[0], "stdout"), piece

    def _container_of(self, container: str) -> aiodocker.containers.DockerContainer:
        return self._docker.containers.container(container)


@contextmanager
def _engine_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except aiodocker.DockerError as error:
        answered = 100 <= error.status < 600  # noqa: PLR2004 - what HTTP has; others are the library's
        raise EngineError(doing, error.message, error.status if answered else None) from error
    except TimeoutError as error:
        raise EngineError(doing, "no answer in time") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise EngineError(doing, str(error) or type(error).__name__) from error


def find_socket(given: str | None) -> str:
    """Return the path of the engine's socket: `given`, `DOCKER_HOST`, or a usual path."""
    host = os.environ.get("DOCKER_HOST", "")
    if given is not None or host.startswith("unix://"):
        return (given or host).removeprefix("unix://")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "/run/user/0")
    usual = [
        "/run/docker.sock",
        "/run/podman/podman.sock",
        f"{runtime}/docker.sock",
        f"{runtime}/podman/podman.sock",
    ]
    return next((path for path in usual if Path(path).is_socket()), usual[0])
