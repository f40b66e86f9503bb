"""The directory, the environment variables and the standard input of a command.

A command does not get the worker's credentials: only the listed variables of the worker's
environment are passed on, and the list cannot contain the names of credentials.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from datetime import datetime

    from workpool import DaemonThreads, Session, WorkItem

log = logging.getLogger(__name__)

DEFAULT_VARIABLES: Final = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
)
"""The variables of the worker's environment that a command gets by default."""


def inherited_environment_variables(names: Iterable[str]) -> dict[str, str]:
    """Return the variables of the worker's environment that have one of these names."""
    return {name: os.environ[name] for name in names if name in os.environ}


def id_environment_variables(session: Session) -> dict[str, str]:
    """Return the variables with the ids of the item, the session and the environment."""
    return {
        "WORKPOOL_WORK_ID": session.item.id,
        "WORKPOOL_SESSION_ID": session.item.session_id,
        "WORKPOOL_ENVIRONMENT_ID": session.item.environment_id,
    }


def redelivery_environment_variables(session: Session) -> dict[str, str]:
    """Return the variable that says whether the item was delivered before."""
    return {"WORKPOOL_REDELIVERED": "1" if session.redelivered else "0"}


def trace_context_environment_variables(session: Session) -> dict[str, str]:
    """Return the variable `TRACEPARENT`, or no variable if the session has no trace context."""
    return {} if session.traceparent is None else {"TRACEPARENT": session.traceparent}


def encode_item_as_json(item: WorkItem) -> bytes:
    """Return the item as one line of JSON, with the field names of the protocol."""
    return (
        json.dumps(
            {
                "id": item.id,
                "type": "work",
                "environment_id": item.environment_id,
                "data": {"type": item.type, "id": item.session_id},
                "state": item.state,
                "created_at": _format_timestamp(item.created_at),
                "acknowledged_at": _format_timestamp(item.acknowledged_at),
                "started_at": _format_timestamp(item.started_at),
                "latest_heartbeat_at": item.last_heartbeat,
                "stop_requested_at": _format_timestamp(item.stop_requested_at),
                "stopped_at": _format_timestamp(item.stopped_at),
                "metadata": dict(item.metadata),
            }
        ).encode()
        + b"\n"
    )


def _format_timestamp(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat().replace("+00:00", "Z")


def ensure_private_directory(root: Path, name: str) -> Path:
    """Return the private directory `name` below `root`, and create it if it does not exist.

    Raises:
        OSError: The directory cannot be created, or another file has this name.
    """
    path = root / name
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise
        path.chmod(0o700)
    return path


@asynccontextmanager
async def temporary_directory(
    root: Path | None, name: str, threads: DaemonThreads
) -> AsyncIterator[Path]:
    """Create a new private directory, and remove it when the `with` block ends.

    Each run has a new directory, because an earlier run of the item may still be ending here.

    Args:
        root: The parent directory. None: the directory for temporary files.
        name: The prefix of the directory's name.
        threads: The threads that remove the directory, which can take long.

    Raises:
        OSError: The directory cannot be created.
    """
    directory = tempfile.TemporaryDirectory(prefix=f"{name}-", dir=root, ignore_cleanup_errors=True)
    try:
        yield Path(directory.name)
    finally:
        await threads.run(_remove_directory, directory)


def _remove_directory(directory: tempfile.TemporaryDirectory[str]) -> None:
    directory.cleanup()
    if Path(directory.name).exists():
        log.warning("directory not removed", extra={"path": directory.name})
