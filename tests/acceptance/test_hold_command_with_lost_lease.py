"""Handoffs in which the parent loses its lease, or the child starts too late."""

from __future__ import annotations

import asyncio
import os
import sys
from subprocess import DEVNULL
from typing import TYPE_CHECKING

import pytest

from tests.integration.test_handoff import HandoffTestbed
from workpool import LeaseLost, Settings, WorkClient
from workpool.server import ControlPlane
from workpool.testing import Clock
from workpool.testing.virtual_time import in_virtual_time
from workpool.wire.protocol import NO_HEARTBEAT

if TYPE_CHECKING:
    from pathlib import Path

    from workpool import Session

TTL_SECONDS = 60
"""A lease that is long enough for the start of a process on a loaded machine."""


async def run_hold_command(
    plane: ControlPlane, work_id: str, last: str, *command: str, **more: str
) -> int:
    """Run `workpool hold` until it ends, and return its exit status."""
    variables = {
        "WORKPOOL_BASE_URL": plane.base_url,
        "WORKPOOL_ENVIRONMENT_ID": plane.environments[0],
        "WORKPOOL_TOKEN": plane.token,
        "WORKPOOL_HOLD_WORK_ID": work_id,
        "WORKPOOL_HOLD_LAST_HEARTBEAT": last,
        "WORKPOOL_HOLD_TTL": str(TTL_SECONDS),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workpool", "hold", "--", *command),
        env=os.environ | variables | more,
        stderr=DEVNULL,
    )
    return await process.wait()


def make_client(plane: ControlPlane, name: str) -> WorkClient:
    settings = Settings(
        base_url=plane.base_url, token=plane.token, environment_id=plane.environments[0]
    )
    return WorkClient(settings, worker_id=name)


@in_virtual_time
async def test_handover_block_is_not_entered_if_heartbeats_cannot_be_suspended() -> None:
    """`async with session.handover()` enters its block only after it has suspended heartbeats.

    In this test, the renewer thread never confirms the suspension, until the lease is lost.
    """
    bench = HandoffTestbed()
    entered = False

    async def assert_handoff_raises_lease_lost(session: Session) -> None:
        nonlocal entered
        renewer = session._held._context.renewer  # type: ignore[attr-defined]  # no test has another way
        # Drop calls to the renewer thread, so that the thread seems to be suspended.
        renewer.call_on_renewer_loop = lambda *_: None
        with pytest.raises(LeaseLost):
            async with session.handover():
                entered = True

    await bench.run_handler(assert_handoff_raises_lease_lost, reclaim_older_than_ms=60_000)
    assert not entered


@pytest.mark.acceptance
async def test_hold_command_after_loss_of_parent_lease_leaves_item_to_new_worker(
    tmp_path: Path,
) -> None:
    """Another worker has acknowledged the item after the parent's lease expired.

    The child must not send the first heartbeat, which would take the lease from this worker.
    """
    clock = Clock()
    async with ControlPlane(now=clock) as plane:
        [item] = plane.enqueue()
        async with make_client(plane, "parent") as parent, make_client(plane, "other") as other:
            await parent.poll()
            await parent.ack(item.id)
            last = await parent.heartbeat(item.id, NO_HEARTBEAT, TTL_SECONDS)
            clock.advance(TTL_SECONDS + 1)
            await other.poll()
            await other.ack(item.id)

            status = await run_hold_command(
                plane, item.id, last.last_heartbeat, "touch", str(tmp_path / "child-ran")
            )

            # This first heartbeat of the other worker succeeds only if the child has sent none.
            await other.heartbeat(item.id, NO_HEARTBEAT, TTL_SECONDS)
    assert status == 1
    assert not (tmp_path / "child-ran").exists()


@pytest.mark.acceptance
async def test_hold_command_ignores_plugins_in_config_file_shared_with_parent(
    tmp_path: Path,
) -> None:
    """Parent and child read the same configuration file, whose plugins are only for the parent."""
    config = tmp_path / "workpool.toml"
    config.write_text(
        '[workpool]\nplugins = ["orders:Orders"]\n[workpool.plugin.Orders]\npath = "a"'
    )
    async with ControlPlane() as plane:
        [item] = plane.enqueue()
        async with make_client(plane, "parent") as parent:
            await parent.poll()
            await parent.ack(item.id)
            last = await parent.heartbeat(item.id, NO_HEARTBEAT, TTL_SECONDS)
            config_variable = {"WORKPOOL_CONFIG": str(config)}
            assert (
                await run_hold_command(
                    plane, item.id, last.last_heartbeat, "true", **config_variable
                )
                == 0
            )
            assert (await parent.get(item.id)).state == "stopped"


@pytest.mark.acceptance
async def test_sighup_ends_program_of_hold_command_although_hold_command_ignores_sighup(
    tmp_path: Path,
) -> None:
    note = tmp_path / "ended"
    script = f"kill -HUP $$; touch {note}"
    async with ControlPlane() as plane:
        [item] = plane.enqueue()
        async with make_client(plane, "parent") as parent:
            await parent.poll()
            await parent.ack(item.id)
            last = await parent.heartbeat(item.id, NO_HEARTBEAT, TTL_SECONDS)
            assert (
                await run_hold_command(plane, item.id, last.last_heartbeat, "sh", "-c", script) == 1
            )
    assert not note.exists()


@pytest.mark.acceptance
async def test_handoff_to_hold_command_is_not_counted_as_overlapping_lease() -> None:
    async with ControlPlane() as plane:
        [item] = plane.enqueue()
        async with make_client(plane, "parent") as parent:
            await parent.poll()
            await parent.ack(item.id)
            last = await parent.heartbeat(item.id, NO_HEARTBEAT, TTL_SECONDS)
            assert await run_hold_command(plane, item.id, last.last_heartbeat, "true") == 0
        assert plane.summary().overlapping == 0


async def test_heartbeat_of_worker_that_did_not_claim_item_counts_as_overlapping_lease() -> None:
    """A child in a handoff sends the time of the holder's last heartbeat, which marks the handoff.

    The worker `thief` does not send it, so its heartbeat counts as an overlap.
    """
    async with ControlPlane() as plane:
        [item] = plane.enqueue()
        async with make_client(plane, "holder") as holder, make_client(plane, "thief") as thief:
            await holder.poll()
            await holder.ack(item.id)
            await thief.heartbeat(item.id, NO_HEARTBEAT, TTL_SECONDS)
        assert plane.summary().overlapping == 1
