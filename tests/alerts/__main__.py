"""Fire every alert with a real Prometheus, and print what fired: `python -m tests.alerts`.

Takes 20 minutes by default, because rules look back for up to 15. All causes run at once. Needs the
program `prometheus`. The exit status is 1 if an alert that must fire did not, or one fired that
neither must nor may.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from tests.alerts.alert_cause_setup import ROOT, AlertCauseSetup
from tests.alerts.alert_causes import CAUSES
from tests.alerts.prometheus import run_prometheus

if TYPE_CHECKING:
    from collections.abc import Mapping

MINUTES: Final = 20.0
LOOK_SECONDS: Final = 5.0
BACKLOG_SECONDS: Final = 120
"""Replaces the threshold of the rule WorkpoolBacklog, which each operator must choose."""
TWO_WORKERS: Final = "env-kill-9-of-one-worker"
"""The environment with two workers; an alert must fire if it has fewer."""


class AlertFiringRecorder:
    """Records the seconds from the start to the first firing of each alert in each environment."""

    def __init__(self, url: str, setups: Mapping[str, AlertCauseSetup]) -> None:
        self.first: dict[tuple[str, str], float] = {}
        self._url = url
        self._environments = {
            f"127.0.0.1:{port}": setup.environment
            for setup in setups.values()
            for port in setup.ports
        }

    async def watch_alerts(self) -> None:
        """Query Prometheus repeatedly, and record the first firing of each alert."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with aiohttp.ClientSession() as http:
            while True:
                async with http.get(f"{self._url}/api/v1/alerts") as answer:
                    found: dict[str, Any] = await answer.json()
                for alert in found["data"]["alerts"]:
                    labels = alert["labels"]
                    instance = self._environments.get(labels.get("instance", ""), "all")
                    key = labels["alertname"], labels.get("environment_id", instance)
                    if alert["state"] == "firing" and key not in self.first:
                        self.first[key] = loop.time() - started
                await asyncio.sleep(LOOK_SECONDS)


async def main() -> int:
    """Run the alert causes that the command line selects, and print the alerts that fired."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names of causes; default: all")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    options = parser.parse_args()
    program = shutil.which("prometheus")
    if program is None:
        print("prometheus is not installed")  # noqa: T201 - a command's output
        return 2
    chosen = {
        name: cause
        for name, cause in CAUSES.items()
        if not options.names or any(part in name for part in options.names)
    }
    folder = Path(tempfile.mkdtemp(prefix="workpool-alerts-"))
    print(f"logs and data: {folder}")  # noqa: T201 - a command's output
    async with AsyncExitStack() as stack:
        setups = {
            name: await stack.enter_async_context(
                AlertCauseSetup("env-" + re.sub(r"\W+", "-", name), cause, folder)
            )
            for name, cause in chosen.items()
        }
        ports = [port for setup in setups.values() for port in setup.ports]
        rules = _write_rule_files(folder)
        url = await stack.enter_async_context(
            run_prometheus(program, folder, ports, seconds=15, rules=[rules])
        )
        firings = AlertFiringRecorder(url, setups)
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(firings.watch_alerts())
            causes = [
                group.create_task(cause.begin(setups[name])) for name, cause in chosen.items()
            ]
            await asyncio.sleep(60 * options.minutes)
            for cause_task in causes:
                cause_task.cancel()
            for setup in setups.values():
                setup.kill_workers()
            # No worker is left, so the alert WorkpoolNoWorkers must fire during this sleep.
            await asyncio.sleep(150)
            watching.cancel()
    return _print_report(firings, {name: setups[name].environment for name in chosen})


def _write_rule_files(folder: Path) -> Path:
    rules = (ROOT / "workpool/alerts.yml").read_text()
    path = folder / "alerts.yml"
    rules = rules.replace("_age_seconds) > 900", f"_age_seconds) > {BACKLOG_SECONDS}")
    workers = f'(workpool_build_info{{environment_id="{TWO_WORKERS}"}}) < 2'
    path.write_text(rules.replace("(workpool_build_info) < 1", workers))
    return path


def _print_report(firings: AlertFiringRecorder, environments: Mapping[str, str]) -> int:
    """Print the alerts of each cause, and return 1 if one is missing or unexpected, else 0."""
    wrong = 0
    for name, environment in environments.items():
        cause = CAUSES[name]
        fired = {alert: at for (alert, where), at in firings.first.items() if where == environment}
        missing = cause.must - fired.keys()
        unexpected = fired.keys() - cause.must - cause.may
        wrong += bool(missing or unexpected)
        shown = ", ".join(f"{alert} {at:.0f} s" for alert, at in sorted(fired.items())) or "–"
        verdict = "ok" if not (missing or unexpected) else "WRONG"
        print(f"{verdict:5} {name}: {shown}")  # noqa: T201 - a command's output
        for alert in sorted(missing):
            print(f"      missing: {alert}")  # noqa: T201 - a command's output
    everywhere = {alert for alert, where in firings.first if where == "all"}
    print(f"kill -9 of all workers: {', '.join(sorted(everywhere)) or '–'}")  # noqa: T201 - output
    return int(bool(wrong) or everywhere != {"WorkpoolNoWorkers"})


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
