"""A PostgreSQL cluster for tests, with a data directory and a port of its own.

The fixture `postgres` starts one cluster for each process of pytest, which all its tests share, and
`database_url` makes an empty database for each test. `dedicated_postgres` is a cluster for one
test, which may stop and kill it. Tests that use one of them are trials, since PostgreSQL is no
Python package, and are skipped with a reason where it is missing.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.reserved_port import reserve_port

if TYPE_CHECKING:
    from collections.abc import Iterator

SUPERUSER = "workpool"
FIXTURES = ("postgres", "dedicated_postgres")
"""The fixtures whose tests are trials."""
SECONDS = 60
"""Maximum time for the start or the end of a cluster on a loaded machine."""
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    # Without a sync to disk, a commit still survives kill -9 of the whole server, because the
    # operating system has the commit's log record. Only a crash of the machine would lose it.
    "fsync": "off",
    "synchronous_commit": "on",
    "shared_buffers": "64MB",
    "log_min_messages": "warning",
}
TEST_SECONDS = 300
"""Time limit of a test that may create and start a cluster."""


class PostgresMissingError(Exception):
    """Raised if PostgreSQL cannot run on this machine."""


class Cluster:
    """One PostgreSQL server with its own data directory. All methods block the calling thread.

    Args:
        folder: An absent folder, with a short path, since it contains a socket.
        settings: Settings of the server beside `SETTINGS`.

    Attributes:
        port: The port on the loopback interface, the same after each restart.
    """

    def __init__(self, folder: Path, settings: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.port = 0
        self._reserved = ExitStack()
        self._data = folder / "data"
        self._log = folder / "log"
        self._programs = postgres_program_folder()
        self._settings = {**SETTINGS, "unix_socket_directories": str(folder), **(settings or {})}
        self._numbers = count(1)
        # Run the programs as another user, because `initdb` and `postgres` refuse to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None

    @property
    def pid(self) -> int:
        """The process id of the running server, which is the parent of its other processes."""
        return int((self._data / "postmaster.pid").read_text().partition("\n")[0])

    def create_data_directory(self) -> None:
        """Make the data directory. Raises `PostgresMissingError`."""
        self._make_folder()
        self._run_program(
            "initdb", "--no-sync", "--auth=trust", f"--username={SUPERUSER}", "-E", "UTF8"
        )

    def create_standby_directory(self, primary: Cluster) -> None:
        """Make the data directory of a standby, which follows a running primary."""
        self._make_folder()
        self._run_program(
            *("pg_basebackup", "--no-sync", "--checkpoint=fast", "--write-recovery-conf"),
            *("-d", primary.url()),
        )

    def promote_to_primary(self) -> None:
        """Make a standby a primary, and return once it accepts writes."""
        self._run_pg_ctl("promote")

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700)
        if self._user is not None:
            try:
                owner = pwd.getpwnam(self._user)
            except KeyError:
                raise PostgresMissingError("no user postgres to run the server as") from None
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        if not self.port:
            self.port = self._reserved.enter_context(reserve_port())
        options = [f"-c {name}={value}" for name, value in self._settings.items()]
        options.append(f"-c port={self.port}")
        try:
            self._run_pg_ctl("start", "-l", str(self._log), "-o", " ".join(options))
        except subprocess.CalledProcessError as error:
            error.add_note(self.read_log())
            raise

    def stop(self, mode: str = "fast") -> None:
        """End the server: `fast` closes all connections, `smart` waits until clients close them."""
        self._run_pg_ctl("stop", "-m", mode)

    def restart(self) -> None:
        """End the server, which cuts all connections, and start it again on the same port."""
        self.stop()
        self.start()

    def kill_all_processes(self) -> None:
        """Kill every process of the server, as a crash does, and return once they have ended."""
        first = self.pid
        # Suspend the server first, so that it starts no more processes.
        os.kill(first, signal.SIGSTOP)
        processes = [first, *_child_pids(first)]
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while any(_is_running(process) for process in processes):
            if time.monotonic() > deadline:
                pytest.fail("a killed process of PostgreSQL did not end")
            time.sleep(0.01)
        # In a container without an init process, the killed processes stay zombies. Remove the lock
        # files, or `pg_ctl` would consider the server to be running.
        for lock in (self._data / "postmaster.pid", *self.folder.glob(".s.PGSQL.*.lock")):
            lock.unlink()

    def remove(self) -> None:
        """End the server, if it runs, and delete its directory."""
        with suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        self._reserved.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database of this cluster."""
        return f"postgresql://{SUPERUSER}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database, and return its URL."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, sql: str, url: str | None = None) -> str:
        """Run statements on a new connection, and return the rows of the last one.

        The result has a line for each row, with `|` between its columns.
        """
        words = ("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", url or self.url())
        return self._run_and_return_output("psql", *words, "-c", sql).strip()

    def read_log(self) -> str:
        """Return the log of the server."""
        return self._log.read_text()

    def _run_pg_ctl(self, action: str, *words: str) -> None:
        self._run_program("pg_ctl", action, "-w", "-t", str(SECONDS), "-s", *words)

    def _run_program(self, program: str, *words: str) -> None:
        """Run a PostgreSQL program on the data directory, with its output in a temporary file.

        A pipe would stay open as long as the server that the program starts, so reading would hang.
        """
        with tempfile.TemporaryFile() as output:
            try:
                subprocess.run(  # noqa: S603 - our own words
                    [str(self._programs / program), "-D", str(self._data), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,
                    user=self._user,
                    group=self._user,
                    extra_groups=None if self._user is None else [],
                    timeout=2 * SECONDS,
                    check=True,
                )
            except subprocess.CalledProcessError as error:
                output.seek(0)
                error.add_note(output.read().decode(errors="replace"))
                raise

    def _run_and_return_output(self, program: str, *words: str) -> str:
        done = subprocess.run(  # noqa: S603 - our own words
            [str(self._programs / program), *words],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def postgres_program_folder() -> Path:
    """Return the folder of PostgreSQL's programs. Raises `PostgresMissingError`."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"),
        key=lambda path: int(path.parts[-3]) if path.parts[-3].isdigit() else 0,
    )
    if found:
        return found[-1].parent
    other = shutil.which("initdb")
    if other is None:
        raise PostgresMissingError("not installed: initdb, of the package postgresql")
    return Path(other).resolve().parent


def start_cluster(settings: dict[str, str] | None = None) -> Cluster:
    """Make and start a cluster, which the caller must remove. Raises `PostgresMissingError`."""
    postgres_program_folder()
    # Use /tmp: the user of the server may have no access to a folder of pytest, and the path of a
    # socket must be short.
    parent = Path(tempfile.mkdtemp(prefix="workpool-postgres-", dir="/tmp"))
    parent.chmod(0o711)
    cluster = Cluster(parent / "cluster", settings)
    try:
        cluster.create_data_directory()
        cluster.start()
    except BaseException:
        remove_cluster(cluster)
        raise
    return cluster


def remove_cluster(cluster: Cluster) -> None:
    """End a cluster that `start_cluster` returned, and delete its folders."""
    cluster.remove()
    shutil.rmtree(cluster.folder.parent, ignore_errors=True)


def _running_cluster() -> Iterator[Cluster]:
    try:
        cluster = start_cluster()
    except PostgresMissingError as error:
        pytest.skip(str(error))
    try:
        yield cluster
    finally:
        remove_cluster(cluster)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """Return the cluster that all tests of this process share; no test may stop it."""
    yield from _running_cluster()


def extend_database_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extend the time limits of database calls, so that slow ones give no 503 on a busy machine."""
    for name in ("CONNECT_SECONDS", "ACQUIRE_SECONDS", "STATEMENT_SECONDS"):
        monkeypatch.setattr(f"workpool.server.postgres.connection_pool.{name}", float(SECONDS))


@pytest.fixture
def dedicated_postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Return a running cluster of this test alone, which the test may stop and kill."""
    extend_database_limits(monkeypatch)
    yield from _running_cluster()


@pytest.fixture
def standby(dedicated_postgres: Cluster) -> Iterator[Cluster]:
    """Return a running standby server of `dedicated_postgres`, with synchronous replication."""
    standby = Cluster(dedicated_postgres.folder.with_name("standby"))
    standby.create_standby_directory(dedicated_postgres)
    try:
        standby.start()
        dedicated_postgres.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        dedicated_postgres.execute("SELECT pg_reload_conf()")
        waiting = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        deadline = time.monotonic() + SECONDS
        while dedicated_postgres.execute(waiting) != "1":
            assert time.monotonic() < deadline, "the standby does not follow"
        yield standby
    finally:
        standby.remove()


@pytest.fixture
def database_url(postgres: Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty database of this test alone."""
    extend_database_limits(monkeypatch)
    return postgres.create_database()


def _child_pids(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in text.split()]


def _is_running(process: int) -> bool:
    """Return whether a process still runs; a zombie does not count as running."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
