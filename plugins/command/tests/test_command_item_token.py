"""Tests of the setting `item_token`: the command gets the item's token, not the worker's key."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from plugins.command.tests.conftest import WAIT_SECONDS
from workpool.errors import WorkpoolError
from workpool.events import SessionFinished
from workpool_command import Command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workpool.testing import Kit

DUMP_PROGRAM = r"""
import os, sys, urllib.request
with open(sys.argv[1], "wb") as dump:
    def add(path):
        try:
            if os.path.isfile(path):
                dump.write(b"== " + os.fsencode(path) + b"\n" + open(path, "rb").read() + b"\n")
        except OSError as error:
            dump.write(b"== %s: %s\n" % (os.fsencode(path), str(error).encode()))
    processes = ["self"]
    if b"\0hold\0" in open(f"/proc/{os.getppid()}/cmdline", "rb").read():
        processes.append(str(os.getppid()))
    for process in processes:
        add(f"/proc/{process}/environ")
        add(f"/proc/{process}/cmdline")
        for number in os.listdir(f"/proc/{process}/fd"):
            try:
                target = os.readlink(f"/proc/{process}/fd/{number}")
            except OSError:
                continue
            dump.write(b"== fd " + os.fsencode(target) + b"\n")
            if target.startswith("/") and target != os.path.realpath(sys.argv[1]):
                add(target)
    for folder, _, names in os.walk("."):
        for name in names:
            add(os.path.join(folder, name))
    dump.write(sys.stdin.buffer.read())
    url = f"{os.environ['WORKPOOL_BASE_URL']}/sessions/{os.environ['WORKPOOL_SESSION_ID']}"
    token = os.environ["WORKPOOL_TOKEN"]
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as response:
        dump.write(b"== session %d processes %d\n" % (response.status, len(processes)))
"""
"""A program that writes everything that it can read of its own process, and of a parent process
`workpool hold`, to a file."""


@pytest.fixture
def worker_settings(kit: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a worker. Its key is also in a file and in environment variables."""
    key = tmp_path / "key"
    key.write_text(kit.server.token)
    monkeypatch.setenv("ANTHROPIC_ENVIRONMENT_KEY", kit.server.token)
    monkeypatch.setenv("WORKPOOL_TOKEN", kit.server.token)
    return {
        "dialect": "anthropic",
        "base_url": kit.server.anthropic_base_url,
        "token": kit.server.token,
        "api_key": "second-credential",
        "extra_headers": {"x-worker-token": "secret-of-the-header"},
    }


@pytest.fixture
def find_worker_secrets(kit: Kit) -> Callable[[bytes], list[bytes]]:
    def find_secrets_in_process_dump(dump: bytes) -> list[bytes]:
        secrets = (kit.server.token.encode(), b"second-credential", b"secret-of-the-header")
        return [secret for secret in secrets if secret in dump]

    return find_secrets_in_process_dump


def create_process_dump_command(tmp_path: Path, **options: Any) -> Command:
    command = [sys.executable, "-c", DUMP_PROGRAM, str(tmp_path / "dump")]
    return Command(command=command, item_token=True, root=str(tmp_path / "root"), **options)


async def test_command_with_token_of_item_cannot_read_key_of_worker(
    kit: Kit,
    worker_settings: dict[str, Any],
    find_worker_secrets: Callable[[bytes], list[bytes]],
    tmp_path: Path,
) -> None:
    result = await kit.run_session(
        create_process_dump_command(tmp_path), timeout=WAIT_SECONDS, **worker_settings
    )
    assert result.outcome == "completed"
    dump = (tmp_path / "dump").read_bytes()
    assert b"WORKPOOL_TOKEN=item." in dump
    assert b"== session 200 processes 1" in dump
    assert find_worker_secrets(dump) == []


async def test_command_gets_no_token_variable_if_item_token_setting_is_false(
    kit: Kit, worker_settings: dict[str, Any], tmp_path: Path
) -> None:
    command = Command(command=["sh", "-c", f"env >{tmp_path}/env"])
    assert (
        await kit.run_session(command, timeout=WAIT_SECONDS, **worker_settings)
    ).outcome == "completed"
    assert "WORKPOOL_TOKEN" not in (tmp_path / "env").read_text()


@pytest.mark.acceptance
async def test_detached_command_and_workpool_hold_process_cannot_read_key_of_worker(
    kit: Kit,
    procfs: Any,
    worker_settings: dict[str, Any],
    find_worker_secrets: Callable[[bytes], list[bytes]],
    tmp_path: Path,
) -> None:
    before = procfs.list_child_processes()
    async with kit.pool(create_process_dump_command(tmp_path, detach=True), **worker_settings):
        (item,) = kit.enqueue()
        finished = await kit.recorder.wait_for(SessionFinished, timeout=WAIT_SECONDS)
        assert finished.outcome == "detached"
        await kit.faults.wait_for("stop", answered=True, timeout=WAIT_SECONDS)
        # Wait until the pool has reaped the `workpool hold` process. Then at most one child process
        # is left: the plugin's guard process, which runs until the pool ends.
        await procfs.wait_until(lambda: len(procfs.list_child_processes() - before) <= 1)
    assert kit.item(item).state == "stopped"
    dump = (tmp_path / "dump").read_bytes()
    assert b"WORKPOOL_TOKEN=item." in dump
    assert b"== session 200 processes 2" in dump
    assert find_worker_secrets(dump) == []


async def test_detached_command_for_item_without_token_fails(
    kit: Kit, worker_settings: dict[str, Any], tmp_path: Path
) -> None:
    qoder = {**worker_settings, "dialect": "qoder", "base_url": kit.server.base_url}
    result = await kit.run_session(
        create_process_dump_command(tmp_path, detach=True), timeout=WAIT_SECONDS, **qoder
    )
    assert result.outcome == "failed"
    assert isinstance(result.error, WorkpoolError)
    assert "without a token of its own" in str(result.error)
    assert len(kit.recorder.of(SessionFinished)) == 1
