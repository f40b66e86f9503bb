"""What stands between a session's commands and this machine: nothing, or bubblewrap.

Owns the sandbox's command line and the proof, at start, that it works here. Inside, a command sees
the system's programs read-only and the workspace; it has its own process and network namespaces, so
neither this worker's environment nor any of its files can be reached, rlimits and a session keyring
of its own.

A worker that is root gives each session a user id of its own: root is exempt from RLIMIT_NPROC, and
would own /proc/sys. Any other worker's sandboxes are user namespaces that cannot make more of them.
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

from workpool_toolset import launcher
from workpool_toolset.shell import REAP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workpool_toolset.workspace import Root

HOME: Final = "/workspace"
"""Where a sandboxed session sees its workspace."""

ALLOWED: Final = ("PATH", "HOME", "LANG", "TZ", "TMPDIR")
"""All that a command gets of this process's environment; the token is in there too."""

SETPRIV: Final = "/usr/bin/setpriv"
MOUNT: Final = "/usr/bin/mount"
_LAUNCHER: Final = str(Path(launcher.__file__).resolve())
_SHARED: Final = ".shm"
INODE_BYTES: Final = 16 * 1024
"""A directory in memory holds a file for each of these bytes of its size at most."""
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROBE_SECONDS: Final = 20.0
FIRST_USER: Final = 1_900_000_000  # a range that no distribution hands out
USERS: Final = 200_000_000

_ETC: Final = (
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "ssl/certs",
)
_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
VISIBLE: Final = (*_SYSTEM, *(f"/etc/{name}" for name in _ETC))
"""What every sandbox shows of this machine, to read."""
_TMP: Final = "/tmp"  # noqa: S108 - the sandbox's own
_SHM: Final = "/dev/shm"  # noqa: S108 - the sandbox's own
_NAMESPACES: Final = (
    *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
    *("--hostname", "sandbox", "--die-with-parent"),
)
BASH: Final = ("/bin/bash", "--noprofile", "--norc")
_QUIET: Final = {"PS1": "", "PS2": "", "TERM": "dumb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one process of a sandbox may use, by rlimit.

    `memory_mb` is also the size of `/tmp` and `/dev/shm` together.
    """

    memory_mb: int = 4096
    cpu_seconds: int = 3600
    processes: int = 512
    file_mb: int = 4096

    def script(self) -> str:
        """Shell code that goes home, sets them for good, then becomes its arguments."""
        # Goes home here: `bwrap` of a root worker may not enter what is its session's alone.
        # -d, not -v: programs like node reserve far more addresses than they ever use.
        return (
            f"cd {HOME} && ulimit -c 0 -d {self.memory_mb * 1024} -t {self.cpu_seconds}"
            f' -u {self.processes} -f {self.file_mb * 1024} -n 4096 && exec "$@"'
        )


class Isolation(Protocol):
    """How a session's commands are run."""

    @property
    def name(self) -> str:
        """Its name in the settings and the log."""

    @property
    def sandboxed(self) -> bool:
        """Whether commands see nothing but the workspace and what was shown to them."""

    def shown(self, workspace: Path, /) -> str:
        """Where the session sees its workspace."""

    def owner(self, session: str, /) -> tuple[int, int] | None:
        """Whose the session's files are; None: this process's."""

    def command(self, session: str, workspace: Path, words: Sequence[str], /) -> list[str]:
        """The command line that runs `words` for the session."""

    def environment(self, explicit: Mapping[str, str] | None) -> dict[str, str]:
        """All variables that the session's commands get."""


@dataclass(frozen=True, slots=True)
class Bare:
    """No isolation: commands may do all that this process may."""

    name: str = field(default="none", init=False)
    sandboxed: bool = field(default=False, init=False)

    def shown(self, workspace: Path) -> str:
        """Its real path."""
        return str(workspace)

    def owner(self, _session: str, /) -> None:
        """This process's."""

    def command(self, _session: str, _workspace: Path, words: Sequence[str], /) -> list[str]:
        """The words themselves."""
        return list(words)

    def environment(self, explicit: Mapping[str, str] | None) -> dict[str, str]:
        """The allowed variables, or exactly the explicit ones."""
        allowed = {name: os.environ[name] for name in ALLOWED if name in os.environ}
        return _QUIET | (allowed if explicit is None else dict(explicit))


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """A sandbox per shell, by `bwrap` 0.8 or later.

    Attributes:
        limits: Of each process.
        roots: More directories to show, at the same path as here.
        as_root: Whether this process is root, so that each session gets a user of its own.
        program: The path of `bwrap`.
    """

    limits: Limits
    roots: tuple[Root, ...] = ()
    as_root: bool = field(default_factory=lambda: os.geteuid() == 0)
    program: str = field(default_factory=lambda: shutil.which("bwrap") or "bwrap")
    name: str = field(default="bubblewrap", init=False)
    sandboxed: bool = field(default=True, init=False)

    def shown(self, _workspace: Path, /) -> str:
        """The same for every session."""
        return HOME

    def owner(self, session: str) -> tuple[int, int] | None:
        """A user that nobody else is: two sessions of one id hash share it, and nothing else."""
        if not self.as_root:
            return None
        user = FIRST_USER + zlib.crc32(session.encode()) % USERS
        return user, user

    def command(self, session: str, workspace: Path, words: Sequence[str]) -> list[str]:
        """`bwrap`, then the user, then the limits, then the words."""
        owner = self.owner(session)
        user: list[str] = []
        rights = ["--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
        if owner:
            rights = ["--cap-drop", "ALL"]
            for right in ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN"):
                rights += ["--cap-add", right]
            user = [
                *(*BASH, "-c", self._memory_script(), "memory"),
                *(SETPRIV, f"--reuid={owner[0]}", f"--regid={owner[1]}", "--clear-groups"),
                *("--inh-caps=-all", "--no-new-privs", "--"),
            ]
        limited = [*BASH, "-c", self.limits.script(), "limited", *words]
        bwrap = [sys.executable, "-I", "-S", _LAUNCHER, self.program, *_NAMESPACES, *rights]
        return [*bwrap, *self._files(workspace), "--", *user, *limited]

    def environment(self, explicit: Mapping[str, str] | None) -> dict[str, str]:
        """The allowed variables, with places that exist inside, or exactly the explicit ones."""
        if explicit is not None:
            return _QUIET | dict(explicit)
        inside = {"PATH": SYSTEM_PATH, "HOME": HOME, "TMPDIR": _TMP}
        kept = {name: os.environ[name] for name in ("LANG", "TZ") if name in os.environ}
        return _QUIET | kept | inside

    def _memory(self) -> list[str]:
        """`/tmp` and `/dev/shm`, of `memory_mb` together."""
        size = self.limits.memory_mb << 20
        if self.as_root:  # a directory of `/tmp` becomes `/dev/shm` later
            shared = ["--perms", "1777", "--dir", f"{_TMP}/{_SHARED}"]
            return ["--perms", "1777", "--size", str(size), "--tmpfs", _TMP, *shared]
        sizes = {_TMP: size - size // 4, _SHM: size // 4}
        return [
            word
            for place, part in sizes.items()
            for word in ("--perms", "1777", "--size", str(part), "--tmpfs", place)
        ]

    def _memory_script(self) -> str:
        """Shell code that does what bubblewrap cannot: bound the number of files in memory."""
        inodes = (self.limits.memory_mb << 20) // INODE_BYTES
        return (
            f"{MOUNT} -o remount,nr_inodes={inodes} {_TMP}"
            f' && {MOUNT} --bind {_TMP}/{_SHARED} {_SHM} && exec "$@"'
        )

    def _files(self, workspace: Path) -> list[str]:
        words: list[str] = []
        for folder in map(Path, _SYSTEM):
            if folder.is_symlink():
                words += ["--symlink", str(folder.readlink()), str(folder)]
            elif folder.exists():
                words += ["--ro-bind", str(folder), str(folder)]
        words += _open_way("/etc/ssl/certs")
        for name in _ETC:
            words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        words += ["--proc", "/proc", "--dev", "/dev", *self._memory(), "--remount-ro", "/dev"]
        for name in ("/proc/keys", "/proc/key-users"):
            words += ["--ro-bind-try", "/dev/null", name]
        for root in sorted(self.roots, key=lambda root: len(root.shown)):  # inner ones on top
            words += _open_way(root.shown)
            words += ["--bind" if root.writable else "--ro-bind", str(root.host), root.shown]
        return [*words, "--bind", str(workspace), HOME, "--chdir", "/", "--remount-ro", "/"]


def _open_way(path: str) -> list[str]:
    """The directories on the way to a path, for all to pass: `bwrap` would make them private."""
    ways = [str(way) for way in reversed(Path(path).parents) if str(way) != "/"]
    return [word for way in ways for word in ("--perms", "0755", "--dir", way)]


async def problem(sandbox: Bubblewrap, folder: Path) -> str | None:
    """Run the sandbox once, just as a session's is run; what is wrong with it, None when nothing.

    Args:
        sandbox: To be tried.
        folder: Where the sessions' workspaces will be; a directory is made there for the moment.

    Raises:
        OSError: The directory cannot be made or given away, or no process started.
    """
    if os.uname().machine not in launcher.CALLS:
        return f"its system calls cannot be filtered on {os.uname().machine}"
    for program in (sandbox.program, *([SETPRIV, MOUNT] if sandbox.as_root else [])):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as probe:
        owner = sandbox.owner("probe")
        if owner:
            os.chown(probe, *owner)
        words = sandbox.command("probe", Path(probe), [*BASH, "-c", "echo $$ > works"])
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=sandbox.environment(None),
        )
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                _, said = await process.communicate()
        except TimeoutError:
            return "bwrap did not answer"
        finally:
            if process.returncode is None:
                # No such process: other code has reaped it, which a uvloop loop never notices.
                with suppress(ProcessLookupError, TimeoutError):
                    process.kill()
                    async with asyncio.timeout(REAP_SECONDS):
                        await process.wait()
        if process.returncode or not (Path(probe) / "works").exists():
            return said.decode(errors="replace").strip() or f"bwrap ended with {process.returncode}"
    return None
