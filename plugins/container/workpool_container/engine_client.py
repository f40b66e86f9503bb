"""The client of the container engine, Docker or Podman, with one method for each call.

Every call has a time limit except `wait_for_exit_status` and `container_output`, which follow a
container that may run for days. Every failure is an `EngineError`.
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
from workpool_container.options import WORK_ID_LABEL

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping
    from typing import Self

log = logging.getLogger(__name__)

CALL_SECONDS: Final = 60.0
"""The time limit of a call, in seconds. A loaded engine creates and starts containers slowly."""
EXIT_WAIT_SECONDS: Final = (0.25, 10.0)
"""The first and the longest wait for the report of an exit, before the state is read again."""
RETRY_PAUSES_SECONDS: Final = (0.2, 1.0, 5.0)
"""The pauses between calls to an engine that does not answer. The last pause repeats."""
MAX_REMOVAL_TRIES: Final = 5
"""The number of answers with status 500 after which the removal of a container fails."""
PULL_SECONDS: Final = 600.0
"""The time limit of the pull of an image, in seconds."""
BASE_URL: Final = "http://localhost"
"""The URL of the engine. The host name has no effect, because the connection is a Unix socket."""
STREAM_NAMES: Final = {1: "stdout", 2: "stderr"}
"""The names of the output streams by their numbers in the Docker API."""
GIVEN_UP_SUFFIX: Final = "-ended"
"""The suffix of the name of a container that its worker has given up.

See plugins/container/README.md, "Adoption".
"""
_RUNNING_STATES: Final = {"running", "paused", "stopping", "restarting"}
_EXITED_STATES: Final = {"exited", "stopped", "dead"}


class EngineError(WorkpoolError):
    """The engine refused a call, or did not answer it.

    Attributes:
        status: The HTTP status; None without an answer, when the call may have been carried out.
    """

    def __init__(self, action: str, problem: str, status: int | None = None) -> None:
        super().__init__(f"{action}: {problem}")
        self.status = status

    @property
    def is_not_found(self) -> bool:
        """Whether the engine answered that the container or the image does not exist."""
        return self.status == HTTPStatus.NOT_FOUND


@dataclass(frozen=True, slots=True)
class ListedContainer:
    """One entry of the engine's list of containers."""

    id: str
    name: str
    state: str
    labels: Mapping[str, str]

    @property
    def was_started(self) -> bool:
        """Whether the container runs, or has run."""
        return self.state in _RUNNING_STATES or self.state in _EXITED_STATES

    @property
    def is_marked_for_removal(self) -> bool:
        """Whether the name shows that a worker removes the container, so no worker may adopt it."""
        return self.name.endswith(GIVEN_UP_SUFFIX)


class EngineClient:
    """A client of the engine at `socket`. Call `negotiate_api_version` before other methods."""

    def __init__(self, socket: str) -> None:
        self.socket = socket

    async def __aenter__(self) -> Self:
        # The number of connections is unlimited: each running container uses two, and a call that
        # stops a container must not wait for a free connection.
        connector = aiohttp.UnixConnector(self.socket, limit=0)
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=10.0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        self._docker = aiodocker.Docker(
            BASE_URL, connector=connector, session=self._session, timeout=timeout
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._docker.close()
        await self._session.close()

    async def negotiate_api_version(self) -> str:
        """Use the API version of the engine from now on. Return the engine's name and version."""
        with _wrap_engine_errors("asking for the version"):
            async with self._session.get(f"{BASE_URL}/version", raise_for_status=True) as response:
                version = await response.json()
        if "ApiVersion" not in version:
            raise EngineError("asking for the version", "the server is no container engine")
        self._docker.api_version = f"v{version['ApiVersion']}"
        names = [part["Name"] for part in version.get("Components") or ()]
        return f"{names[0] if names else 'engine'} {version.get('Version')}"

    async def has_image(self, image: str) -> bool:
        """Return whether the engine has the image."""
        try:
            with _wrap_engine_errors(f"looking for image {image}"):
                await self._docker.images.inspect(image)
        except EngineError as error:
            if error.is_not_found:
                return False
            raise
        return True

    async def pull_image(self, image: str) -> None:
        """Make the engine pull the image, within `PULL_SECONDS`."""
        log.info("pulling an image", extra={"image": image})
        with _wrap_engine_errors(f"pulling image {image}"):
            async with asyncio.timeout(PULL_SECONDS):
                await self._docker.images.pull(image, timeout=None)

    async def list_containers(self, label: str, value: str) -> list[ListedContainer]:
        """Return all containers with this label, in any state."""
        filters = json.dumps({"label": [f"{label}={value}"]})
        with _wrap_engine_errors("listing containers"):
            listed = await self._docker.containers.list(all=True, filters=filters)
        return [
            ListedContainer(
                each.id,
                str((each["Names"] or [""])[0]).removeprefix("/"),
                str(each["State"]).lower(),
                each["Labels"] or {},
            )
            for each in listed
            if WORK_ID_LABEL in (each["Labels"] or {})
        ]

    async def create_container(self, name: str, specification: Mapping[str, Any]) -> str:
        """Create a container without starting it, and return its id."""
        with _wrap_engine_errors("creating a container"):
            created = await self._docker.containers.create(dict(specification), name=name)
        return created.id

    async def start_container(self, container: str) -> None:
        """Start a created container.

        The request is never repeated, because a second one would restart an ended container.
        """
        with _wrap_engine_errors("starting the container"):
            await self._container_by_id_or_name(container).start()

    async def rename_container(self, name: str, new_name: str) -> bool:
        """Rename a container, and return whether a container had the old name.

        Of two concurrent calls with the same old name, only one returns true.
        """
        try:
            with _wrap_engine_errors("renaming the container"):
                await self._container_by_id_or_name(name).rename(new_name)
        except EngineError as error:
            if error.is_not_found:
                return False
            raise
        return True

    async def stop_container(self, container: str, grace: float) -> None:
        """Stop a container with its stop signal, and with SIGKILL after `grace` seconds."""
        with _wrap_engine_errors("stopping the container"):
            async with asyncio.timeout(CALL_SECONDS + grace):
                await self._container_by_id_or_name(container).stop(t=math.ceil(grace))

    async def remove_container(self, container: str) -> None:
        """Kill and remove the container, and wait until the container does not exist anymore."""
        with _wrap_engine_errors("removing the container"):
            async with asyncio.timeout(CALL_SECONDS):
                tries = 1
                while not await self._try_remove_container(
                    container, last=tries >= MAX_REMOVAL_TRIES
                ):
                    tries += 1
                    await asyncio.sleep(RETRY_PAUSES_SECONDS[0])

    async def _try_remove_container(self, container: str, *, last: bool) -> bool:
        try:
            await self._container_by_id_or_name(container).delete(force=True, v=True)
        except aiodocker.DockerError as error:
            if error.status == HTTPStatus.CONFLICT:
                return False  # Docker answers 409 while an earlier call removes the container.
            if error.status == HTTPStatus.INTERNAL_SERVER_ERROR and not last:
                return False  # Podman answers 500 while a cancelled `stop` is in progress.
            if error.status != HTTPStatus.NOT_FOUND:
                raise
        return True

    async def wait_for_exit_status(self, container: str) -> int:
        """Wait without a time limit for the container's exit, also while the engine restarts.

        Raises:
            EngineError: The container does not exist anymore.
        """
        failures, patience = 0, EXIT_WAIT_SECONDS[0]
        while True:
            try:
                status = await self._exit_status(container)
                if status is not None:
                    return status
                await self._wait_for_next_container_exit(container, patience)
                failures, patience = 0, min(2 * patience, EXIT_WAIT_SECONDS[1])
            except EngineError as error:
                if error.is_not_found:
                    raise
                # Try again after any other error, because the container may still run. The pool
                # keeps extending the lease meanwhile.
                log.warning(
                    "container not reached: %s",
                    error,
                    extra={"container_id": container[:12], "error": str(error)},
                )
                await asyncio.sleep(
                    RETRY_PAUSES_SECONDS[min(failures, len(RETRY_PAUSES_SECONDS) - 1)]
                )
                failures += 1

    async def _exit_status(self, container: str) -> int | None:
        """Return the exit status, or None if the container has not exited.

        The state is checked too: an engine may report the status 0 during a removal.
        """
        with _wrap_engine_errors("looking at the container"):
            state = (await self._container_by_id_or_name(container).show())["State"]
        return int(state["ExitCode"]) if str(state["Status"]).lower() in _EXITED_STATES else None

    async def _wait_for_next_container_exit(self, container: str, patience: float) -> None:
        """Wait at most `patience` seconds until the container exits. Ignore exits before this call.

        The condition is `next-exit`, because Podman uses a whole core for any other one.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                with _wrap_engine_errors("waiting for the container"):
                    await self._container_by_id_or_name(container).wait(condition="next-exit")

    async def container_output(
        self, container: str, tail: str
    ) -> AsyncGenerator[tuple[str, bytes], None]:
        """Yield the output as pairs of a stream's name and a chunk, until the output ends.

        The request bypasses aiodocker, which leaves the connection open if the reader stops early.

        Args:
            container: The id or name of the container.
            tail: The number of earlier lines to repeat, or `all`.
        """
        url = f"{BASE_URL}/{self._docker.api_version}/containers/{container}/logs"
        query = {"stdout": "1", "stderr": "1", "follow": "1", "tail": tail}
        endless = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
        action = "reading the container's output"
        with _wrap_engine_errors(action):
            async with self._session.get(url, params=query, timeout=endless) as response:
                if response.status != HTTPStatus.OK:
                    raise EngineError(action, response.reason or "refused", response.status)
                with suppress(asyncio.IncompleteReadError):
                    # Each chunk has a header of 8 bytes: the stream's number and the length.
                    while True:
                        header = await response.content.readexactly(8)
                        chunk = await response.content.readexactly(int.from_bytes(header[4:]))
                        yield STREAM_NAMES.get(header[0], "stdout"), chunk

    def _container_by_id_or_name(self, container: str) -> aiodocker.containers.DockerContainer:
        return self._docker.containers.container(container)


@contextmanager
def _wrap_engine_errors(action: str) -> Iterator[None]:
    try:
        yield
    except aiodocker.DockerError as error:
        # aiodocker also raises this error when there is no response. `status` is then not an HTTP
        # status.
        answered = 100 <= error.status < 600  # noqa: PLR2004 - the statuses of HTTP
        raise EngineError(action, error.message, error.status if answered else None) from error
    except TimeoutError as error:
        raise EngineError(action, "no answer in time") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise EngineError(action, str(error) or type(error).__name__) from error


def find_socket(setting: str | None) -> str:
    """Return the socket path from the setting, else from `DOCKER_HOST`, else a usual path."""
    host = os.environ.get("DOCKER_HOST", "")
    if setting is not None or host.startswith("unix://"):
        return (setting or host).removeprefix("unix://")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "/run/user/0")
    usual_paths = [
        "/run/docker.sock",
        "/run/podman/podman.sock",
        f"{runtime}/docker.sock",
        f"{runtime}/podman/podman.sock",
    ]
    return next((path for path in usual_paths if Path(path).is_socket()), usual_paths[0])
