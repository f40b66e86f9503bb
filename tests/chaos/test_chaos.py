"""A short storm with real processes, after which the guarantees must hold.

A longer storm with any seed: `python -m tests.chaos.storm --seed 1`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos.storm import Storm, StormSettings, report

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.acceptance, pytest.mark.trial, pytest.mark.timeout(180)]

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


async def test_storm_of_faults_loses_no_item_and_runs_none_twice_at_once(tmp_path: Path) -> None:
    verdict = await Storm(SHORT, tmp_path).run_to_end()
    assert verdict.broken == [], report(SHORT, verdict)
    # Faults did happen: even a slow machine causes each of these at least once.
    assert verdict.counts["enqueued"] == verdict.counts["stopped"] > 0
    assert verdict.counts["boots"] >= 2
    for name in ("action: kill", "action: stop", "action: cont", "runs", "record: lapsed"):
        assert verdict.counts[name] >= 1, name
    assert sum(n for name, n in verdict.counts.items() if name.startswith("fault: ")) >= 1
