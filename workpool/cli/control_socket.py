"""The Unix socket through which `workpool pause`, `resume` and `drain` reach a worker.

A worker has a socket of its own, in a directory that belongs to its user alone. A request is one
line of JSON, and so is its answer; both are limited in size and time, and requests are answered one
by one. Neither side trusts another user: the socket has the mode 0600 before it accepts
connections, and both sides ask the kernel for the user of the other process. See
workpool/docs/operating.md, "Pause and drain".
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import socket
import stat
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import orjson

from workpool.errors import ListenError
from workpool.setting_values import number_parser, unlimited_value_parser
from workpool.settings import OFF

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from types import TracebackType

    from workpool.cli.pool_interface import ControllablePool, RunnablePool

log = logging.getLogger("workpool")

SUFFIX: Final = ".sock"
LINE_BYTES: Final = 4096
"""Largest size of a request or an answer, in bytes."""
REQUEST_SECONDS: Final = 2.0
"""Seconds for one request; meanwhile the next one waits."""
LOCK_SECONDS: Final = 2.0
"""Seconds for which another worker of this user may take to open its socket."""
ACCEPT_SECONDS: Final = 1.0
"""Seconds to wait if a connection cannot be accepted because no descriptor is free."""
BACKLOG: Final = 16
PAUSE_REASON: Final = "workpool pause"
"""The reason of a pause whose request gives none."""
ROOT: Final = 0
_read_timeout = unlimited_value_parser(number_parser(zero=True))


def list_socket_directories() -> list[Path]:
    """Return the directories for sockets of this user's workers, the preferred one first."""
    user = os.geteuid()
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}")
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 - owner and mode are checked
    return [runtime / "workpool", temporary / f"workpool-{user}"]


def is_private_directory(directory: Path) -> bool:
    """Return whether the path is a directory that only this user can access.

    A symbolic link counts as no directory.
    """
    try:
        found = directory.lstat()
    except OSError:
        return False
    admits_others = bool(stat.S_IMODE(found.st_mode) & 0o077)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not admits_others


def read_peer_user_id(connection: socket.socket) -> int | None:
    """Return the user id of the connected process; None if the kernel does not report it."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    size = struct.calcsize("3i")
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", found)[1])


class ControlSocket:
    """The control socket of one worker. The constructor creates it; leaving the context removes it.

    Args:
        setting: The path; None: a new path in a directory of this user; `off`: no socket.
        origin: The variable, file or flag of the path, for the error.

    Raises:
        ListenError: The socket of this path cannot be created. Without a path, the error is only
            logged.

    Attributes:
        environments: The environments of a worker that has several, by id.
    """

    def __init__(self, setting: str | None, origin: str = "") -> None:
        self.environments: Mapping[str, ControllablePool] = {}
        self._listener: socket.socket | None = None
        self._path = Path()
        self._identity = (0, 0)
        if setting == OFF or not hasattr(socket, "AF_UNIX"):
            return
        if setting is not None:
            try:
                self._open_listener(Path(setting))
            except OSError as error:
                problem = error.strerror or str(error)
                where = f" (from {origin})" if origin else ""
                raise ListenError(f"control_socket: {setting}: {problem}{where}") from None
            return
        try:
            self._open_listener(
                _choose_socket_directory() / f"{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
            )
        except OSError as error:
            problem = error.strerror or str(error)
            log.info("no control socket: %s", problem, extra={"error": problem})

    def __enter__(self) -> Self:
        if self._listener is not None:
            log.info("control socket open", extra={"file": str(self._path)})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listener is None:
            return
        self._listener.close()
        with contextlib.suppress(OSError):
            found = self._path.lstat()
            # Do not remove the socket of another worker that has replaced this worker's socket.
            if (found.st_dev, found.st_ino) == self._identity:
                self._path.unlink()

    async def answer_requests(self, pool: RunnablePool) -> None:
        """Answer requests one by one until cancelled. Must run on the event loop of the pool."""
        if self._listener is None:
            return
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                problem = error.strerror or str(error)
                log.warning("control socket cannot accept: %s", problem, extra={"error": problem})
                await asyncio.sleep(ACCEPT_SECONDS)
                continue
            # A client that disconnects early must not end the loop that accepts connections.
            with connection, contextlib.suppress(OSError):
                async with asyncio.timeout(REQUEST_SECONDS):
                    await _answer_request(connection, pool, self.environments)

    def _open_listener(self, path: Path) -> None:
        """Listen at a path, after removing the socket that an ended worker left there."""
        # Without the lock, another worker could remove this socket between `bind` and `listen`.
        with _socket_directory_lock(path.parent):
            _remove_dead_socket(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listener.bind(str(path))
                path.chmod(0o600)
                # Call `chmod` before `listen`, because clients can connect after `listen`.
                listener.listen(BACKLOG)
                listener.setblocking(False)
            except BaseException:
                listener.close()
                raise
            found = path.lstat()
        self._listener, self._path = listener, path
        self._identity = (found.st_dev, found.st_ino)


def _choose_socket_directory() -> Path:
    """Return a directory for the socket, after removing the sockets of ended workers from it.

    Raises:
        OSError: No directory can be used or created.
    """
    for directory in list_socket_directories():
        if directory.parent.is_dir():
            with contextlib.suppress(OSError):
                directory.mkdir(mode=0o700)
            if is_private_directory(directory) and os.access(directory, os.W_OK):
                with _socket_directory_lock(directory):
                    for path in directory.glob(f"*{SUFFIX}"):
                        # Ignore an OSError: it means that the path was not removed, because a
                        # running worker listens on it or because it is no socket of this user.
                        with contextlib.suppress(OSError):
                            _remove_dead_socket(path)
                return directory
    raise OSError(errno.EACCES, "no directory of this user can be used")


@contextlib.contextmanager
def _socket_directory_lock(directory: Path) -> Iterator[None]:
    """Lock a directory of sockets, as each worker does while it opens its socket there.

    Raises:
        OSError: Another process has held the lock for `LOCK_SECONDS`.
    """
    import fcntl  # noqa: PLC0415 - Windows has none, and no such socket

    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
            time.sleep(LOCK_SECONDS / 100)
        yield
    finally:
        os.close(descriptor)


def _remove_dead_socket(path: Path) -> None:
    """Remove the socket of a worker that has ended without removing it.

    Raises:
        OSError: The path is no socket of this user, or a worker listens on it.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, "exists and is no socket")
    if found.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "is the socket of another user")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trying:
        trying.setblocking(False)
        result = trying.connect_ex(str(path))
    if result != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, "another worker listens there")
    path.unlink(missing_ok=True)


async def _answer_request(
    connection: socket.socket, pool: RunnablePool, environments: Mapping[str, ControllablePool]
) -> None:
    """Read one request from a connection, execute it, and send the answer."""
    loop = asyncio.get_running_loop()
    user = read_peer_user_id(connection)
    if user not in {None, ROOT, os.geteuid()}:
        return
    received = b""
    while not received.endswith(b"\n") and len(received) <= LINE_BYTES:
        part = await loop.sock_recv(connection, LINE_BYTES + 1 - len(received))
        if not part:
            break
        received += part
    try:
        answer = _execute_request(received, pool, environments)
    except orjson.JSONDecodeError:
        answer = {"error": "the request is not JSON"}
    except ValueError as error:
        answer = {"error": str(error)}
    # Do not await anything between the execution of the request and the sending of the answer:
    # after a drain of an idle pool, the process may end before this task runs again.
    await loop.sock_sendall(connection, orjson.dumps(answer) + b"\n")


def _execute_request(
    line: bytes, pool: RunnablePool, environments: Mapping[str, ControllablePool]
) -> dict[str, Any]:
    """Execute one request, and return the state of the pool or environment that the request names.

    Raises:
        ValueError: The request cannot be read.
    """
    if len(line) > LINE_BYTES:
        raise ValueError("the request is too long")
    request = orjson.loads(line)
    chosen = _find_pool_of_request(request, pool, environments)
    match request:
        case {"command": "status"}:
            pass
        case {"command": "pause", "reason": str(reason)}:
            chosen.pause(reason)
        case {"command": "pause"} if "reason" not in request:
            _pause_unless_paused(environments.values() if chosen is pool else (), chosen)
        case {"command": "resume"}:
            chosen.resume()
        case {"command": "drain", "timeout": timeout}:
            chosen.request_drain(_read_timeout(timeout))
        case {"command": "drain"}:
            chosen.request_drain()
        case _:
            raise ValueError("the request is unknown")
    status = chosen.status()
    return {
        "pid": os.getpid(),
        "environment_id": chosen.settings.environment_id or ",".join(environments)[:200],
        "running": status.running,
        "reasons": [reason[:200] for reason in status.reasons[:5]],
    }


def _pause_unless_paused(members: Collection[ControllablePool], pool: ControllablePool) -> None:
    """Pause each pool in `members`, or `pool` if `members` is empty.

    A pool that is paused already is skipped, so that it keeps the reason of the earlier pause.
    """
    for each in members or (pool,):
        # Do not use `Status.paused`: it is also true while a plugin refuses to claim items.
        if not any(reason.startswith("paused: ") for reason in each.status().reasons):
            each.pause(PAUSE_REASON)


def _find_pool_of_request(
    request: object, pool: RunnablePool, environments: Mapping[str, ControllablePool]
) -> ControllablePool:
    """Return the pool of the environment that a request names, or `pool` if it names none.

    If the worker has several environments, `environments` has the pool of each, and `pool` is the
    group of these pools.

    Raises:
        ValueError: The worker does not have the environment that the request names.
    """
    match request:
        case {"environment_id": str(name)} if name in environments:
            return environments[name]
        case {"environment_id": name} if name != pool.settings.environment_id:
            raise ValueError("the worker has no such environment")
    return pool
