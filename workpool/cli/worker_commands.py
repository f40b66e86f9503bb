"""`workpool pause`, `resume` and `drain`: each sends one request to a worker on this machine.

See workpool/docs/operating.md, "Pause and drain".
"""

import os
import socket
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import orjson
import typer

from workpool.cli import exits
from workpool.cli.control_socket import (
    LINE_BYTES,
    PAUSE_REASON,
    SUFFIX,
    is_private_directory,
    list_socket_directories,
    read_peer_user_id,
)
from workpool.cli.help_text import format_examples_section
from workpool.logs import readable

ANSWER_SECONDS: Final = 5.0
"""Seconds for one request; a worker answers at once unless a handler blocks its event loop."""
ANSWER_BYTES: Final = 4 * LINE_BYTES

SocketPath = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        metavar="PATH",
        help="The worker's `control_socket`. Default: those of all workers of this user.",
    ),
]
Pid = Annotated[
    int | None,
    typer.Option("--pid", metavar="PID", help="The process id of the worker. Default: any."),
]
Environment = Annotated[
    str | None,
    typer.Option(
        "--environment-id",
        metavar="ID",
        help="The worker's environment; if the worker has several, the others go on. Default: any.",
    ),
]
EXAMPLES: Final = {
    "pause": format_examples_section(
        "workpool pause", "workpool pause 'database is moved' --pid 4711"
    ),
    "resume": format_examples_section("workpool resume", "workpool resume --environment-id env_1"),
    "drain": format_examples_section(
        "workpool drain", "workpool drain --timeout 300 --socket /run/workpool/reports.sock"
    ),
}


class WorkerRequestError(Exception):
    """Raised if a request to a worker fails; the message gives the reason."""


def pause(
    reason: Annotated[
        str | None,
        typer.Argument(
            metavar="REASON",
            help="Shown in the log and in `/readyz`. Default: that of the current pause, or "
            f"`{PAUSE_REASON}`.",
        ),
    ] = None,
    path: SocketPath = None,
    pid: Pid = None,
    environment_id: Environment = None,
) -> None:
    """Pause a worker: it claims no more items, and its sessions go on.

    The worker is the only one of this user on this machine, or the one that the flags choose.
    """
    given = {} if reason is None else {"reason": reason}
    _send_request_to_chosen_worker(
        {"command": "pause", **given}, "paused", path, pid, environment_id
    )


def resume(path: SocketPath = None, pid: Pid = None, environment_id: Environment = None) -> None:
    """Let a paused worker claim items again.

    The worker is the only one of this user on this machine, or the one that the flags choose.
    """
    _send_request_to_chosen_worker({"command": "resume"}, "resumed", path, pid, environment_id)


def drain(
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS|unlimited",
            help="The time that running sessions have. Default: the worker's `drain_timeout`.",
        ),
    ] = None,
    path: SocketPath = None,
    pid: Pid = None,
    environment_id: Environment = None,
) -> None:
    """Drain a worker: its sessions end, and then the worker ends.

    The same as SIGTERM. A second drain can shorten the time and not extend it. The worker is the
    only one of this user on this machine, or the one that the flags choose.
    """
    given = {} if timeout is None else {"timeout": timeout}
    _send_request_to_chosen_worker(
        {"command": "drain", **given}, "draining", path, pid, environment_id
    )


def _send_request_to_chosen_worker(
    request: Mapping[str, object],
    done: str,
    path: Path | None,
    pid: int | None,
    environment_id: str | None,
) -> None:
    """Send a request to the worker that the flags choose, and print the answer of the worker."""
    if environment_id is not None:
        request = {**request, "environment_id": environment_id}
    try:
        chosen = _choose_worker(path, pid, environment_id)
        answer = _send_request(chosen, request)
    except (OSError, WorkerRequestError) as error:
        _print_errors_and_exit(exits.FAILED, _find_failure_reason(error))
    if "error" in answer:
        _print_errors_and_exit(exits.USAGE, f"{chosen}: {answer['error']}")
    typer.echo(f"{done} {_describe_worker(answer)}")


def _choose_worker(path: Path | None, pid: int | None, environment_id: str | None) -> Path:
    """Return the socket of the only worker that matches the flags; otherwise end the command."""
    wanted = {"pid": pid, "environment_id": environment_id}
    asked = {} if environment_id is None else {"environment_id": environment_id}
    paths = [path] if path is not None else _find_sockets()
    found = {}
    for each in paths:
        try:
            answer = _send_request(each, {"command": "status", **asked})
        except (OSError, WorkerRequestError) as error:
            if path is not None:
                raise WorkerRequestError(f"{path}: {_find_failure_reason(error)}") from None
            if not isinstance(error, ConnectionRefusedError | FileNotFoundError):
                typer.echo(f"workpool: {each}: {readable(_find_failure_reason(error))}", err=True)
            continue
        if all(value is None or answer.get(name) == value for name, value in wanted.items()):
            found[each] = answer
    if len(found) == 1:
        return next(iter(found))
    if found:
        lines = [f"{_describe_worker(answer)} socket={each}" for each, answer in found.items()]
        _print_errors_and_exit(
            exits.USAGE,
            "several workers listen; choose one with --pid, --environment-id or --socket",
            *lines,
        )
    fitting = "" if wanted == {"pid": None, "environment_id": None} else " that the flags fit"
    where = ", ".join(map(str, [path] if path is not None else list_socket_directories()))
    raise WorkerRequestError(
        f"no worker{fitting} listens (looked at {where}); it may run as another user, on another "
        "machine, or with another control_socket, which --socket names"
    )


def _find_sockets() -> list[Path]:
    found: list[Path] = []
    for directory in list_socket_directories():
        if is_private_directory(directory):
            found += sorted(directory.glob(f"*{SUFFIX}"))
        elif directory.exists():
            typer.echo(f"workpool: {directory}: not used, as others have access to it", err=True)
    return found


def _send_request(path: Path, request: Mapping[str, object]) -> dict[str, Any]:
    """Send one request to a control socket, and return the answer.

    Raises:
        OSError: No worker listens, or the worker does not answer in time.
        WorkerRequestError: The socket is not this user's, or its answer cannot be read.
    """
    line = orjson.dumps(request) + b"\n"
    if len(line) > LINE_BYTES:
        raise WorkerRequestError("the reason is too long")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        _connect_to_own_socket(connection, path)
        connection.sendall(line)
        received = _receive_worker_answer(connection)
    try:
        answer = orjson.loads(received)
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        raise WorkerRequestError("the answer cannot be read")
    return answer


def _connect_to_own_socket(connection: socket.socket, path: Path) -> None:
    """Connect to a control socket that belongs to this user.

    Raises:
        WorkerRequestError: The path is no socket, or another user owns the socket or listens on it.
    """
    found, user = path.lstat(), os.geteuid()
    if not stat.S_ISSOCK(found.st_mode):
        raise WorkerRequestError("is no socket")
    if found.st_uid == user:
        connection.connect(str(path))
    if found.st_uid != user or read_peer_user_id(connection) not in {None, user}:
        raise WorkerRequestError(
            f"belongs to the user {found.st_uid}: run the command as that user"
        )


def _receive_worker_answer(connection: socket.socket) -> bytes:
    end = time.monotonic() + ANSWER_SECONDS
    received = b""
    while not received.endswith(b"\n") and len(received) < ANSWER_BYTES:
        connection.settimeout(max(0.001, end - time.monotonic()))
        part = connection.recv(LINE_BYTES)
        if not part:
            break
        received += part
    return received


def _find_failure_reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return (
            f"no answer in {ANSWER_SECONDS:.0f} s; the request may have an effect later; "
            "a handler may block the event loop of the worker"
        )
    if isinstance(error, ConnectionRefusedError):
        return "no worker listens there anymore"
    return getattr(error, "strerror", None) or str(error)


def _describe_worker(answer: Mapping[str, Any]) -> str:
    names = ("pid", "environment_id", "running")
    shown = [f"{name}={readable(str(answer.get(name)), 200)}" for name in names]
    reasons = answer.get("reasons")
    if isinstance(reasons, list) and reasons:
        shown.append(f"not ready: {readable('; '.join(map(str, reasons)), 1000)}")
    return " ".join(shown)


def _print_errors_and_exit(status: int, *lines: str) -> NoReturn:
    for line in lines:
        typer.echo(f"workpool: {readable(line)}", err=True)
    raise typer.Exit(status)
