"""Isolates a session's commands from the machine: by a bubblewrap sandbox, or not at all.

This module has the command line of the sandbox, and a check that the sandbox works here. Inside, a
command sees the programs of the system (read-only) and the workspace. It has process and network
namespaces, rlimits and a session keyring of its own, so it cannot read the worker's environment and
files.

A worker that runs as root gives each session a user id of its own, because root is exempt from
RLIMIT_NPROC and would own /proc/sys. The sandboxes of other workers are user namespaces that cannot
create further namespaces. See plugins/toolset/README.md, "Isolation".
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from workpool_toolset import sandbox_launcher
from workpool_toolset.shell import REAP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workpool_toolset.workspace import WorkspaceRoot

HOME: Final = "/workspace"
"""The path of the workspace inside of a sandbox."""

INHERITED_VARIABLES: Final = ("PATH", "HOME", "LANG", "TZ", "TMPDIR")
"""The variables of the worker that a command gets. Other variables may contain the token."""

SETPRIV: Final = "/usr/bin/setpriv"
MOUNT: Final = "/usr/bin/mount"
_LAUNCHER: Final = str(Path(sandbox_launcher.__file__).resolve())
_SHARED: Final = ".shm"
INODE_BYTES: Final = 16 * 1024
"""The bytes of a directory in memory for each file that the directory may contain."""
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROBE_SECONDS: Final = 20.0
"""The time limit of the check of the sandbox, in seconds."""
FIRST_USER: Final = 1_900_000_000
"""The first user id of sessions, in a range that no distribution assigns."""
USERS: Final = 200_000_000
"""The number of user ids of sessions."""

_ETC: Final = (
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "ssl/certs",
)
_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
VISIBLE_PATHS: Final = (*_SYSTEM, *(f"/etc/{name}" for name in _ETC))
"""The paths of the machine that every sandbox shows read-only."""
_TMP: Final = "/tmp"  # noqa: S108 - the sandbox's own
_SHM: Final = "/dev/shm"  # noqa: S108 - the sandbox's own
_NAMESPACES: Final = (
    *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
    *("--hostname", "sandbox", "--die-with-parent"),
)
BASH: Final = ("/bin/bash", "--noprofile", "--norc")
_QUIET: Final = {"PS1": "", "PS2": "", "TERM": "dumb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """The resource limits of one process in a sandbox.

    `memory_mb` is also the size of `/tmp` and `/dev/shm` together.
    """

    memory_mb: int = 4096
    cpu_seconds: int = 3600
    processes: int = 512
    file_mb: int = 4096

    def make_setup_script(self) -> str:
        """Return a script that enters the workspace, sets the limits and runs its arguments."""
        # Enter the workspace here and not with `--chdir`: the `bwrap` of a root worker may not
        # enter it. Limit the data size (`-d`) and not the address space (`-v`), because programs
        # such as node reserve much more address space than they use.
        return (
            f"cd {HOME} && ulimit -c 0 -d {self.memory_mb * 1024} -t {self.cpu_seconds}"
            f' -u {self.processes} -f {self.file_mb * 1024} -n 4096 && exec "$@"'
        )


class CommandIsolation(Protocol):
    """Isolates the commands of sessions. `NoIsolation` and `Bubblewrap` implement it."""

    @property
    def name(self) -> str:
        """The value of the setting `isolation`, which is also logged."""

    @property
    def is_sandboxed(self) -> bool:
        """Whether commands run in a sandbox, which shows only some files of the machine."""

    def workspace_path(self, workspace: Path, /) -> str:
        """Return the path under which the session sees its workspace."""

    def owner_of_session_files(self, session: str, /) -> tuple[int, int] | None:
        """Return the user and group id for the session's files. None means this process's ids."""

    def command_line(self, session: str, workspace: Path, words: Sequence[str], /) -> list[str]:
        """Return the command line that runs the command `words` in isolation for the session."""

    def command_environment_variables(self, explicit: Mapping[str, str] | None) -> dict[str, str]:
        """Return all environment variables of commands: `explicit`, or defaults if it is None."""


@dataclass(frozen=True, slots=True)
class NoIsolation:
    """The isolation `none`: commands may do everything that this process may do."""

    name: str = field(default="none", init=False)
    is_sandboxed: bool = field(default=False, init=False)

    def workspace_path(self, workspace: Path) -> str:
        """Return the real path of the workspace."""
        return str(workspace)

    def owner_of_session_files(self, _session: str, /) -> None:
        """Return None, because the files belong to the user of this process."""

    def command_line(self, _session: str, _workspace: Path, words: Sequence[str], /) -> list[str]:
        """Return the command `words` without a sandbox around it."""
        return list(words)

    def command_environment_variables(self, explicit: Mapping[str, str] | None) -> dict[str, str]:
        """Return `explicit`. If it is None, return the `INHERITED_VARIABLES` of this process."""
        allowed = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        return _QUIET | (allowed if explicit is None else dict(explicit))


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """The isolation `bubblewrap`: each shell runs in a sandbox of `bwrap` 0.8 or later.

    Attributes:
        limits: The limits of each process.
        roots: Further directories that sessions see, at the same path.
        as_root: Whether this process is root, and each session gets a user id of its own.
        program: The path of `bwrap`.
    """

    limits: ProcessLimits
    roots: tuple[WorkspaceRoot, ...] = ()
    as_root: bool = field(default_factory=lambda: os.geteuid() == 0)
    program: str = field(default_factory=lambda: shutil.which("bwrap") or "bwrap")
    name: str = field(default="bubblewrap", init=False)
    is_sandboxed: bool = field(default=True, init=False)

    def workspace_path(self, _workspace: Path, /) -> str:
        """Return `HOME`, because the workspace has this path in every sandbox."""
        return HOME

    def owner_of_session_files(self, session: str) -> tuple[int, int] | None:
        """Return user and group ids derived from the session's id, or None if not `as_root`."""
        if not self.as_root:
            return None
        user = FIRST_USER + zlib.crc32(session.encode()) % USERS
        return user, user

    def command_line(self, session: str, workspace: Path, words: Sequence[str]) -> list[str]:
        """Return a `bwrap` command line that sets the user and the limits, and runs `words`."""
        owner = self.owner_of_session_files(session)
        user: list[str] = []
        rights = ["--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
        if owner:
            rights = ["--cap-drop", "ALL"]
            for right in ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN"):
                rights += ["--cap-add", right]
            user = [
                *(*BASH, "-c", self._script_that_mounts_in_memory_directories(), "memory"),
                *(SETPRIV, f"--reuid={owner[0]}", f"--regid={owner[1]}", "--clear-groups"),
                *("--inh-caps=-all", "--no-new-privs", "--"),
            ]
        limited = [*BASH, "-c", self.limits.make_setup_script(), "limited", *words]
        bwrap = [sys.executable, "-I", "-S", _LAUNCHER, self.program, *_NAMESPACES, *rights]
        return [*bwrap, *self._mount_options(workspace), "--", *user, *limited]

    def command_environment_variables(self, explicit: Mapping[str, str] | None) -> dict[str, str]:
        """Return `explicit`. If it is None, return default variables that fit the sandbox."""
        if explicit is not None:
            return _QUIET | dict(explicit)
        sandbox_paths = {"PATH": SYSTEM_PATH, "HOME": HOME, "TMPDIR": _TMP}
        kept = {name: os.environ[name] for name in ("LANG", "TZ") if name in os.environ}
        return _QUIET | kept | sandbox_paths

    def _in_memory_directory_options(self) -> list[str]:
        """Return `bwrap` options for `/tmp` and `/dev/shm`, which share the size `memory_mb`."""
        size = self.limits.memory_mb << 20
        if self.as_root:
            # Create a directory below `/tmp`, which `_script_that_mounts_in_memory_directories`
            # mounts as `/dev/shm`.
            shared = ["--perms", "1777", "--dir", f"{_TMP}/{_SHARED}"]
            return ["--perms", "1777", "--size", str(size), "--tmpfs", _TMP, *shared]
        sizes = {_TMP: size - size // 4, _SHM: size // 4}
        return [
            word
            for place, part in sizes.items()
            for word in ("--perms", "1777", "--size", str(part), "--tmpfs", place)
        ]

    def _script_that_mounts_in_memory_directories(self) -> str:
        """Return a script that limits `/tmp`, mounts `/dev/shm` and runs its arguments.

        The limit of `/tmp` is a number of files.
        """
        inodes = (self.limits.memory_mb << 20) // INODE_BYTES
        return (
            f"{MOUNT} -o remount,nr_inodes={inodes} {_TMP}"
            f' && {MOUNT} --bind {_TMP}/{_SHARED} {_SHM} && exec "$@"'
        )

    def _mount_options(self, workspace: Path) -> list[str]:
        words: list[str] = []
        for folder in map(Path, _SYSTEM):
            if folder.is_symlink():
                words += ["--symlink", str(folder.readlink()), str(folder)]
            elif folder.exists():
                words += ["--ro-bind", str(folder), str(folder)]
        words += _options_that_create_parents("/etc/ssl/certs")
        for name in _ETC:
            words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        words += [
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            *self._in_memory_directory_options(),
            "--remount-ro",
            "/dev",
        ]
        for name in ("/proc/keys", "/proc/key-users"):
            words += ["--ro-bind-try", "/dev/null", name]
        # Mount outer directories first, or they would hide the inner ones.
        for root in sorted(self.roots, key=lambda root: len(root.shown)):
            words += _options_that_create_parents(root.shown)
            words += ["--bind" if root.writable else "--ro-bind", str(root.host), root.shown]
        return [*words, "--bind", str(workspace), HOME, "--chdir", "/", "--remount-ro", "/"]


def _options_that_create_parents(path: str) -> list[str]:
    """Return `bwrap` options that create the parents of a path. All users may read the parents."""
    parents = [str(parent) for parent in reversed(Path(path).parents) if str(parent) != "/"]
    return [word for parent in parents for word in ("--perms", "0755", "--dir", parent)]


async def find_sandbox_problem(sandbox: Bubblewrap, folder: Path) -> str | None:
    """Run a sandbox once. Return the reason why the sandbox does not work, or None if it works.

    Args:
        sandbox: The sandbox.
        folder: The parent of the workspaces, in which a temporary directory is created.

    Raises:
        OSError: The directory or the process cannot be created.
    """
    if os.uname().machine not in sandbox_launcher.CALLS:
        return f"its system calls cannot be filtered on {os.uname().machine}"
    for program in (sandbox.program, *([SETPRIV, MOUNT] if sandbox.as_root else [])):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as probe:
        owner = sandbox.owner_of_session_files("probe")
        if owner:
            os.chown(probe, *owner)
        words = sandbox.command_line("probe", Path(probe), [*BASH, "-c", "echo $$ > works"])
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=sandbox.command_environment_variables(None),
        )
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                _, error_text = await process.communicate()
        except TimeoutError:
            return "bwrap did not answer"
        finally:
            if process.returncode is None:
                # If other code has reaped the process, `kill` raises an error, and uvloop's
                # `wait` never returns. Suppress the error and limit the wait. Otherwise the
                # check would end with this error or never end.
                with suppress(ProcessLookupError, TimeoutError):
                    process.kill()
                    async with asyncio.timeout(REAP_SECONDS):
                        await process.wait()
        if process.returncode or not (Path(probe) / "works").exists():
            return (
                error_text.decode(errors="replace").strip()
                or f"bwrap ended with {process.returncode}"
            )
    return None
