"""What a command finds around it: its directory, its environment, its standard input.

The worker's credentials are not among it: of the worker's environment only the variables that were
listed are handed on, and none of the names that credentials have is accepted.
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

HANDED_ON: Final = (
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
"""The worker's variables that a command gets unless told otherwise."""
SECRET_PREFIXES: Final = ("WORKPOOL_", "QODER_", "ANTHROPIC_")
"""What the names of the worker's own credentials begin with."""


def handed_on(names: Iterable[str]) -> dict[str, str]:
    """Those of the worker's variables, as far as they are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def ids_of(session: Session) -> dict[str, str]:
    """Variables that say which session a command is run for."""
    return {
        "WORKPOOL_WORK_ID": session.item.id,
        "WORKPOOL_SESSION_ID": session.item.session_id,
        "WORKPOOL_ENVIRONMENT_ID": session.item.environment_id,
    }


def redelivered(session: Session) -> dict[str, str]:
    """Whether it may have been run before."""
    return {"WORKPOOL_REDELIVERED": "1" if session.redelivered else "0"}


def item_json(item: WorkItem) -> bytes:
    """The item as one line of JSON, in the words of the protocol."""
    return (
        json.dumps(
            {
                "id": item.id,
                "type": "work",
                "environment_id": item.environment_id,
                "data": {"type": item.type, "id": item.session_id},
                "state": item.state,
                "created_at": _text(item.created_at),
                "acknowledged_at": _text(item.acknowledged_at),
                "started_at": _text(item.started_at),
                "latest_heartbeat_at": item.last_heartbeat,
                "stop_requested_at": _text(item.stop_requested_at),
                "stopped_at": _text(item.stopped_at),
                "metadata": dict(item.metadata),
            }
        ).encode()
        + b"\n"
    )


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")


def kept_directory(root: Path, name: str) -> Path:
    """The directory of this name, ours alone; that of an earlier run if there was one.

    Raises:
        OSError: It cannot be made, or something else stands in its place.
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
async def fresh_directory(
    root: Path | None, name: str, threads: DaemonThreads
) -> AsyncIterator[Path]:
    """A new directory, ours alone, removed in the end; where temporary files go if `root` is None.

    New for every run: on this machine, one that another worker has taken over may still be ending.

    Args:
        root: Where it is made.
        name: What its name begins with.
        threads: Where it is removed, which can take long.

    Raises:
        OSError: It cannot be made.
    """
    directory = tempfile.TemporaryDirectory(prefix=f"{name}-", dir=root, ignore_cleanup_errors=True)
    try:
        yield Path(directory.name)
    finally:
        await threads.run(_remove, directory)


def _remove(directory: tempfile.TemporaryDirectory[str]) -> None:
    directory.cleanup()
    if Path(directory.name).exists():
        log.warning("directory not removed path=%s", directory.name)
