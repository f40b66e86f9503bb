"""Tests that the guarantees hold after storms of faults with real processes.

A storm with any seed: `python -m tests.chaos.storm --seed 1`; on PostgreSQL,
    `tests.chaos.database_storm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos.database_storm import DatabaseStorm
from tests.chaos.storm import Storm, StormSettings, format_report
from tests.chaos.storm_checker import CLOCK_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.postgres.cluster import Cluster

pytestmark = [pytest.mark.acceptance, pytest.mark.trial, pytest.mark.timeout(480)]

SHORT = StormSettings(
    seed=1,
    seconds=10,
    items_per_second=3,
    longest=4,
    ends=("return", "write", "fail"),
    plane_kill_every=5,
    stop_beyond=(2.0, 2.2),
    fresh=True,
    slack=1.5,
)


async def test_storm_of_faults_causes_no_lost_item_and_no_overlapping_runs(tmp_path: Path) -> None:
    verdict = await Storm(SHORT, tmp_path).run_storm()
    assert verdict.broken == [], format_report(SHORT, verdict)
    # Check that the storm caused faults. Even on a slow machine, each kind occurs at least once.
    assert verdict.counts["enqueued"] == verdict.counts["stopped"] > 0
    assert verdict.counts["boots"] >= 2
    for name in ("action: kill", "action: stop", "action: cont", "runs", "record: lapsed"):
        assert verdict.counts[name] >= 1, name
    assert sum(n for name, n in verdict.counts.items() if name.startswith("fault: ")) >= 1


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_random_faults_on_three_nodes_cause_no_lost_item_and_no_overlapping_leases(
    tmp_path: Path, dedicated_postgres: Cluster, seed: int
) -> None:
    settings = StormSettings(seed=seed, seconds=60, slack=1.5)
    verdict = await DatabaseStorm(settings, tmp_path, dedicated_postgres).run_storm()
    if verdict.clock_change > CLOCK_SECONDS:
        pytest.skip(f"the system's clock was set by {verdict.clock_change:.3f} s during the storm")
    assert verdict.broken == [], format_report(settings, verdict)
    assert verdict.counts["enqueued"] == verdict.counts["stopped"] > 0
    assert verdict.counts["boots"] >= 1
    restarts = ("action: database killed", "action: database stopped")
    assert sum(verdict.counts[name] for name in restarts) >= 2
    for name in ("action: kill", "action: kill plane", "runs", "record: lapsed"):
        assert verdict.counts[name] >= 1, name
