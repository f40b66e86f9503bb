"""The settings of the plugin, and the specification of a container for one item.

This module does no I/O. A container gets the variables of this module and none of the worker's
environment, so the worker's token is not passed on.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, ValidationError

from workpool import WorkpoolError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from typing import Self

    from workpool import Session, WorkItem

WORK_ID_LABEL: Final = "workpool.work_id"
"""The label of a container with the id of its item."""
SESSION_ID_LABEL: Final = "workpool.session_id"
"""The label of a container with the id of its session."""
ENVIRONMENT_ID_LABEL: Final = "workpool.environment_id"
"""The label of a container with the id of its environment."""

MAX_ITEM_BYTES: Final = 100_000
"""The largest JSON text of an item. Linux starts no program with a variable of 128 KiB or more."""
ENGINE_LOG_CONFIG: Final[Mapping[str, object]] = {
    "Type": "json-file",
    "Config": {"max-size": "10m"},
}
"""The log driver of the containers: the plugin can read the log, and the size is limited."""


class ItemTooLarge(WorkpoolError):
    """The item is too large for the environment variable `WORKPOOL_ITEM` of its container."""


def _check_mount(text: str) -> str:
    match = re.fullmatch(r"([^:]+):(/[^:]*)(:ro|:rw)?", text)
    if match is None or not re.match(r"/|[A-Za-z0-9][A-Za-z0-9_.-]*$", match[1]):
        raise ValueError("not /SOURCE:/TARGET or VOLUME:/TARGET, with :ro or :rw after it")
    return text if match[3] else f"{text}:ro"


Mount = Annotated[str, AfterValidator(_check_mount)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ContainerOptions(BaseModel):
    """The settings of `[workpool.plugin.container]`.

    See plugins/container/README.md, "Settings".
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )

    image: Annotated[str, Field(min_length=1)]
    """The image to run. Default: none, it must be set."""
    pull: Literal["never", "missing"] = "never"
    """Whether to pull an image that the engine does not have: `never`, or if `missing`. Default:
    `never`."""
    command: tuple[str, ...] | None = None
    """The program's arguments, a list. Default: the image's own."""
    user: str | None = None
    """The user, as `USER` or `UID:GID`. Default: the image's own."""
    workdir: str | None = None
    """The working directory. Default: the image's own."""
    environment: dict[str, str] = {}
    """Further environment variables; `docker inspect` shows them. Default: none."""
    mounts: tuple[Mount, ...] = ()
    """`SOURCE:TARGET`, read-only unless `:rw` follows. Default: none."""
    network: str = "none"
    """The network to join: `none`, `bridge`, or a network's name. Default: `none`."""
    memory: ByteSize = ByteSize(1 << 30)
    """The largest memory, swap included, as `512MiB`; 0 = no limit. Default: `1GiB`."""
    cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """The largest processor time, in cores; 0 = no limit. Default: 1."""
    pids: Annotated[int, Field(ge=0)] = 256
    """The largest number of processes and threads; 0 = no limit. Default: 256."""
    read_only: bool = True
    """Whether the root file system is read-only. Default: true."""
    tmpfs: dict[str, str] = {"/tmp": "size=64m"}  # noqa: S108 - the container's own
    """Directories in memory, with their mount options. Default: `/tmp` of 64 MB."""
    capabilities: tuple[str, ...] = ()
    """Capabilities to keep; all others are dropped. Default: none."""
    grace: Seconds = 10.0
    """Seconds between SIGTERM and SIGKILL after a stop request. Default: 10."""
    on_drain: Literal["stop", "leave"] = "stop"
    """The effect of a drain on a container: `stop`, or `leave` it running, so that a worker on the
    same engine adopts it. Default: `stop`."""
    log_lines: Annotated[int, Field(ge=0)] = 1000
    """The largest number of logged lines of a container's output. Default: 1000."""
    socket: str | None = None
    """The engine's socket. Default: `DOCKER_HOST` if it is a socket, else the first that exists
    where Docker and Podman have theirs."""
    sweep_seconds: Seconds = 30.0
    """Seconds between two sweeps for leftover containers. Default: 30."""
    item_token: bool = False
    """Whether the container gets the item's own token, as `WORKPOOL_TOKEN`; `docker inspect` shows
    it. Default: false."""
    metadata: dict[str, str] = {}
    """The metadata of the items to take. Default: all items."""
    timeout: Seconds | None = None
    """The limit of a session, in seconds. Default: the pool's `session_timeout`."""
    stall_timeout: Seconds | None = None
    """The time without a line of output after which a session ends as `stalled`, in seconds.
    Default: the pool's `stall_timeout`."""
    max_sessions: Annotated[int, Field(ge=1)] | None = None
    """Containers that this worker runs at once. Default: no limit but `concurrency`."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Check the settings, and return the options.

        Raises:
            ValueError: Some settings are wrong. The text names each of them, and quotes no value.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False, include_input=False)
            problems = [f"{_dotted_setting_name(each['loc'])}: {each['msg']}" for each in details]
        # This error is raised after the except block, so that its traceback does not show the
        # ValidationError, which quotes values that may be secrets.
        raise ValueError("; ".join(problems))


def _dotted_setting_name(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def encode_item_as_json(item: WorkItem) -> str:
    """Return the content of `WORKPOOL_ITEM`: the item as JSON, with the protocol's field names.

    Raises:
        ItemTooLarge: The JSON text has more than `MAX_ITEM_BYTES`.
    """
    text = json.dumps(
        {
            "id": item.id,
            "type": "work",
            "environment_id": item.environment_id,
            "data": {"type": item.type, "id": item.session_id},
            "created_at": _format_timestamp(item.created_at),
            "metadata": dict(item.metadata),
        }
    )
    if len(text) > MAX_ITEM_BYTES:
        raise ItemTooLarge(f"{item.id}: {len(text)} bytes, more than {MAX_ITEM_BYTES}")
    return text


def _format_timestamp(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat().replace("+00:00", "Z")


def container_specification(
    options: ContainerOptions, session: Session, extra_variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the specification of a session's container, in the form of the Docker API.

    Args:
        options: The settings of the plugin.
        session: The session.
        extra_variables: Further environment variables.

    Raises:
        ItemTooLarge: The item is too large for an environment variable.
    """
    item = session.item
    variables = options.environment | {
        "WORKPOOL_WORK_ID": item.id,
        "WORKPOOL_SESSION_ID": item.session_id,
        "WORKPOOL_ENVIRONMENT_ID": item.environment_id,
        "WORKPOOL_REDELIVERED": "1" if session.redelivered else "0",
        "WORKPOOL_ITEM": encode_item_as_json(item),
        **(extra_variables or {}),
    }
    if session.traceparent is not None:
        variables["TRACEPARENT"] = session.traceparent
    overrides = {"Cmd": options.command, "User": options.user, "WorkingDir": options.workdir}
    return {
        "Image": options.image,
        "Env": [f"{name}={value}" for name, value in variables.items()],
        "Labels": {
            WORK_ID_LABEL: item.id,
            SESSION_ID_LABEL: item.session_id,
            ENVIRONMENT_ID_LABEL: item.environment_id,
        },
        "HostConfig": {
            "Binds": list(options.mounts),
            "NetworkMode": options.network,
            "CapDrop": ["ALL"],
            "CapAdd": list(options.capabilities),
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": options.read_only,
            "Tmpfs": options.tmpfs,
            "Memory": int(options.memory),
            # MemorySwap limits memory plus swap. With the same value, the container gets no swap.
            "MemorySwap": int(options.memory),
            "NanoCpus": round(options.cpus * 1e9),
            "PidsLimit": options.pids,
            "LogConfig": ENGINE_LOG_CONFIG,
        },
    } | {key: value for key, value in overrides.items() if value is not None}
