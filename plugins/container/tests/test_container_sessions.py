"""Tests of whole sessions in real containers: environment, privileges, limits and outcome."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from workpool.events import SessionFinished, SessionStarted
from workpool_container import ContainerFailed, ItemTooLarge

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from plugins.container.tests.conftest import ContainerTestbed


def logged_output_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the logged output lines of all containers, without the names of the streams."""
    streams = ("stdout: ", "stderr: ")
    return [line[len("std...: ") :] for line in caplog.messages if line.startswith(streams)]


async def test_container_of_session_gets_variables_with_ids_and_item(
    testbed: ContainerTestbed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    finished = await testbed.run_item(
        "env; echo on stderr >&2", {"job": "x"}, environment={"GREETING": "hello you"}
    )
    item = finished.session.item
    assert finished.outcome == "completed"
    assert testbed.stored_item(item.id).metadata["exit_status"] == "0"
    variables = dict(line.split("=", 1) for line in logged_output_lines(caplog) if "=" in line)
    assert "stderr: on stderr" in caplog.messages
    assert variables["GREETING"] == "hello you"
    assert variables["WORKPOOL_WORK_ID"] == item.id
    assert variables["WORKPOOL_SESSION_ID"] == item.session_id
    assert variables["WORKPOOL_ENVIRONMENT_ID"] == item.environment_id
    assert variables["WORKPOOL_REDELIVERED"] == "0"
    item_json = json.loads(variables["WORKPOOL_ITEM"])
    assert (item_json["id"], item_json["metadata"]) == (item.id, {"job": "x"})
    assert item_json["data"] == {"type": "session", "id": item.session_id}
    assert testbed.plane.token not in str(variables)
    assert await testbed.item_containers(item.id) == []


async def test_exit_status_of_container_determines_outcome(testbed: ContainerTestbed) -> None:
    failed = await testbed.run_item("exit 3")
    assert failed.outcome == "failed"
    assert isinstance(failed.error, ContainerFailed)
    assert failed.error.status == 3

    released = await testbed.run_item("exit 75")
    assert released.outcome == "released"
    assert testbed.stored_item(released.session.item.id).metadata["workpool.released"] == "Release"
    assert await testbed.item_containers(released.session.item.id) == []


async def test_container_has_no_privileges_by_default(
    testbed: ContainerTestbed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name in ("given", "kept"):
        (tmp_path / name).mkdir()
    finished = await testbed.run_item(
        """
        grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status
        touch /here || echo root is read-only
        touch /tmp/here && echo tmp is writable
        ls /sys/class/net
        cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null
        cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null
        touch /given/new || echo the mount is read-only
        touch /kept/new
        """,
        mounts=[f"{tmp_path}/given:/given", f"{tmp_path}/kept:/kept:rw"],
        memory="64MiB",
        pids=17,
    )
    assert finished.outcome == "completed"
    lines = [line.split() for line in logged_output_lines(caplog)]
    assert ["CapEff:", "0000000000000000"] in lines
    assert ["CapBnd:", "0000000000000000"] in lines
    assert ["NoNewPrivs:", "1"] in lines
    assert ["root", "is", "read-only"] in lines
    assert ["tmp", "is", "writable"] in lines
    assert lines.count(["lo"]) == 1
    assert not [line for line in lines if line[0].startswith("eth")]
    assert [str(64 << 20)] in lines
    assert ["17"] in lines


async def test_container_beyond_memory_limit_fails_session(testbed: ContainerTestbed) -> None:
    finished = await testbed.run_item("exec tail /dev/zero", memory="16MiB")
    assert finished.outcome == "failed"
    assert isinstance(finished.error, ContainerFailed)
    assert "out of memory?" in str(finished.error)


async def test_container_with_many_output_lines_logs_only_first_ones(
    testbed: ContainerTestbed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    finished = await testbed.run_item(
        "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done", log_lines=50
    )
    assert finished.outcome == "completed"
    assert logged_output_lines(caplog) == [f"line {number}" for number in range(50)]
    assert "more of its output is not logged" in caplog.messages


async def test_item_too_large_for_environment_variable_fails_session(
    testbed: ContainerTestbed,
) -> None:
    finished = await testbed.run_item("true", {"much": "x" * 100_000})
    assert finished.outcome == "failed"
    assert isinstance(finished.error, ItemTooLarge)


async def test_session_whose_image_lacks_program_is_released(
    testbed: ContainerTestbed, caplog: pytest.LogCaptureFixture
) -> None:
    finished = await testbed.run_item("", command=["/bin/nothing"])
    assert finished.outcome == "released"
    assert "container not started" in caplog.text
    assert "/bin/nothing" in caplog.text
    assert await testbed.item_containers(finished.session.item.id) == []


async def test_container_plugin_with_metadata_setting_takes_only_matching_items(
    testbed: ContainerTestbed,
) -> None:
    testbed.plane.enqueue(metadata={"job": "other"})
    testbed.plane.enqueue(metadata={"job": "mine"})
    pool = testbed.make_pool("true", {"reclaim_older_than_ms": 60_000}, metadata={"job": "mine"})
    async with pool:
        await testbed.recorder.wait_for(SessionFinished)
    (started,) = testbed.recorder.of(SessionStarted)
    assert started.session.item.metadata["job"] == "mine"
