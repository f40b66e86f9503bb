"""The results of simulations, and a progress file that lets a long run continue later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import workpool

if TYPE_CHECKING:
    from collections.abc import Mapping


class SimulationReport(NamedTuple):
    """The summed results of some simulations.

    Attributes:
        faults: Number of calls with a fault.
        actions: Number of actions: work, crashes, cuts, stops …
        checked: Number of invariants checked.
        failures: Seed and violations of each schedule that violated an invariant.
    """

    schedules: int = 0
    faults: int = 0
    actions: int = 0
    checked: int = 0
    failures: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def add_report(self, other: SimulationReport) -> SimulationReport:
        """Return the sum of this report and `other`."""
        return SimulationReport(
            self.schedules + other.schedules,
            self.faults + other.faults,
            self.actions + other.actions,
            self.checked + other.checked,
            self.failures + other.failures,
        )

    def __str__(self) -> str:
        """Return a line with the totals, then the violations of each schedule that has some."""
        lines = [
            f"{self.schedules} schedules, {self.faults} faults, {self.actions} actions, "
            f"{self.checked} invariants checked, {len(self.failures)} broken"
        ]
        for seed, violations in self.failures:
            lines += [f"seed {seed}: {each}" for each in violations[:3]]
            lines.append(f"  replay: python -m tests.simulation --replay {seed}")
        return "\n".join(lines)


class ProgressFile:
    """A file with one line of JSON for each finished part of a long simulation.

    A line names a digest of the source of the package and of the simulation: a result holds for
    that source only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._source = _hash_source_code()

    def read_reports_by_seed_range(self) -> Mapping[range, SimulationReport]:
        """Return the file's results for this version of the source code, by range of seeds."""
        found: dict[range, SimulationReport] = {}
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        for line in lines:
            try:
                part = json.loads(line)
            except ValueError:  # an incomplete line: the process was killed while it wrote
                continue
            if part["source"] == self._source:
                failures = tuple((seed, tuple(texts)) for seed, texts in part["failures"])
                found[range(*part["seeds"])] = SimulationReport(*part["numbers"])._replace(
                    failures=failures
                )
        return found

    def append_report_of_seed_range(self, seeds: range, report: SimulationReport) -> None:
        """Append to the file the result of the simulations of a range of seeds."""
        *numbers, failures = report
        part = {
            "source": self._source,
            "seeds": [seeds.start, seeds.stop],
            "numbers": numbers,
            "failures": failures,
        }
        with self._path.open("a") as file:
            # The newline comes first: the last line of a killed process may be incomplete.
            file.write(f"\n{json.dumps(part)}")


def _hash_source_code() -> str:
    digest = hashlib.sha256()
    folders = Path(workpool.__file__).parent, Path(__file__).parent
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
