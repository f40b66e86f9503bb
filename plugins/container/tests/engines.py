"""Runs Podman or Docker as the container engine of the tests, with its own storage.

If the engine cannot run on this machine, each test that needs it is skipped with the reason.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

IMAGE = "localhost/workpool-test:1"
BUSYBOX_COMMANDS = (
    "cat",
    "echo",
    "env",
    "grep",
    "id",
    "ls",
    "sh",
    "sleep",
    "tail",
    "touch",
    "true",
)
PODMAN_CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
"""
"""The configuration for machines without systemd, with limits that need no CAP_SYS_RESOURCE."""
WAIT_SECONDS = 60.0
"""The time limit of every wait of the tests, in seconds."""


def busybox_archive(program: str) -> bytes:
    """Return a tar archive of a root file system that contains only busybox."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for folder, mode in (("bin", 0o755), ("tmp", 0o1777), ("proc", 0o755), ("etc", 0o755)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        tar.add(program, "bin/busybox")
        for command in BUSYBOX_COMMANDS:
            link = tarfile.TarInfo(f"bin/{command}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return archive.getvalue()


class PodmanEngine:
    """The API service of a Podman whose storage is in `folder`.

    Attributes:
        programs: The programs that must be installed.
        end_signal: The signal that ends the service but not the containers.
        socket: The path of the socket of the service.
        image: The name of an image in the storage.
        registry: A listening socket; Podman pulls from its port without TLS.
    """

    programs = ("podman", "runc", "busybox")
    end_signal = signal.SIGKILL

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "engine.sock")
        self.image = IMAGE
        self.registry = socket.create_server(("127.0.0.1", 0))
        self._folder = folder
        self._service: subprocess.Popen[bytes] | None = None
        (folder / "containers.conf").write_text(PODMAN_CONFIGURATION)
        port = self.registry.getsockname()[1]
        (folder / "registries.conf").write_text(
            f'[[registry]]\nlocation = "localhost:{port}"\ninsecure = true\n'
        )
        self._environment = os.environ | {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
        }

    def run_command(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run a `podman` or `docker` command and return its output. An error skips the test."""
        done = subprocess.run(  # noqa: S603 - no input from outside
            [*self._client_command_line, *arguments],
            env=self._environment,
            input=stdin,
            capture_output=True,
            timeout=2 * WAIT_SECONDS,
            check=False,
        )
        if done.returncode:
            message = done.stderr.decode().strip()[-500:] or f"status {done.returncode}"
            pytest.skip(f"{self.programs[0]} {arguments[0]} does not work here: {message}")
        return done.stdout.decode().strip()

    def start_engine_service(self) -> None:
        """Start the service and wait until it answers."""
        with (self._folder / "service.log").open("ab") as log:
            self._service = subprocess.Popen(  # noqa: S603 - no input from outside
                self._service_command_line,
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + WAIT_SECONDS
        while not Path(self.socket).is_socket():
            if self._service.poll() is not None or time.monotonic() > deadline:
                message = (self._folder / "service.log").read_text().strip()[-500:] or "no message"
                pytest.skip(f"the service of {self.programs[0]} does not start here: {message}")
            time.sleep(0.02)

    def stop_engine_service(self) -> None:
        """End the service of the engine. The containers continue to run."""
        if self._service is not None:
            self._service.send_signal(self.end_signal)
            self._service.wait()
            self._service = None
        Path(self.socket).unlink(missing_ok=True)

    def close(self) -> None:
        """End the service, and close the listening socket `registry`."""
        self.stop_engine_service()
        self.registry.close()

    @property
    def _client_command_line(self) -> list[str]:
        places = [f"--{name}={self._folder / name}" for name in ("root", "runroot", "tmpdir")]
        return ["podman", *places, "--storage-driver=vfs"]

    @property
    def _service_command_line(self) -> list[str]:
        # Let the service end after an hour without requests. Otherwise a killed test run would
        # leave the service running forever.
        return [
            *self._client_command_line,
            "system",
            "service",
            "--time=3600",
            f"unix://{self.socket}",
        ]


class DockerEngine(PodmanEngine):
    """The service `dockerd` with its storage in `folder`. Containers outlive the service."""

    programs = ("docker", "dockerd", "busybox")
    end_signal = signal.SIGTERM

    def close(self) -> None:
        """End the service, and unmount the storage."""
        super().close()
        subprocess.run(["umount", str(self._folder / "data")], check=False)  # noqa: S603, S607 - no input from outside

    @property
    def _client_command_line(self) -> list[str]:
        return ["docker", "--host", f"unix://{self.socket}"]

    @property
    def _service_command_line(self) -> list[str]:
        places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        return [
            *("dockerd", "--host", f"unix://{self.socket}", "--live-restore"),
            *(f"--{name}={self._folder / place}" for name, place in places.items()),
            *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none"),
            *("--storage-driver=vfs", "--default-ulimit=nofile=1024:1024"),
        ]
