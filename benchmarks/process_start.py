"""The time that `workpool --help` and `import workpool` take, compared with `import aiohttp`.

    python benchmarks/process_start.py [--runs N]

Each run starts one process of each kind, one after the other, so that another program's load slows
all kinds alike. The table has the median and the fastest of all runs, and the ratio of the medians.
Before the first run, the modules are compiled into a cache directory of this benchmark, even if
PYTHONDONTWRITEBYTECODE is set: otherwise the compiler's time would be measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmark_runs import describe_cores_and_versions, format_table

KINDS = {
    "import aiohttp": ("-c", "import aiohttp"),
    "workpool --help": ("-m", "workpool", "--help"),
    "from workpool import …": ("-c", "from workpool import Supervisor, Settings, handler"),
    "python alone": ("-c", ""),
}


def time_process(arguments: tuple[str, ...], cache: str) -> float:
    """Run a Python process to its end, and return its duration in seconds."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    variables["PYTHONPYCACHEPREFIX"] = cache
    command = [sys.executable, *arguments]
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=variables)  # noqa: S603 - our own words
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=41, help="processes of each kind")
    runs = parser.parse_args().runs
    taken: dict[str, list[float]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as cache:
        for arguments in KINDS.values():
            # Fill the cache of compiled modules. The measured runs then include no compilation.
            time_process(arguments, cache)
        for _ in range(runs):
            for name, arguments in KINDS.items():
                taken[name].append(time_process(arguments, cache))
    unit = statistics.median(taken["import aiohttp"])
    print(describe_cores_and_versions())
    print(
        format_table(
            ("process", "runs", "median ms", "ratio", "fastest ms"),
            [
                (
                    name,
                    str(runs),
                    f"{statistics.median(each) * 1000:.0f}",
                    f"{statistics.median(each) / unit:.2f} ×",
                    f"{min(each) * 1000:.0f}",
                )
                for name, each in taken.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
