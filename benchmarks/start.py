"""The time that a process takes to start: the help text and the import, beside `import aiohttp`.

    python benchmarks/start.py [--runs N]

Each run starts one process of each kind, one after the other, so that another program's load meets
all of them alike. The table has the median and the fastest of all runs, and the ratio of the
medians. Compiled modules are cached before the first run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from arena import table, versions

KINDS = {
    "import aiohttp": ("-c", "import aiohttp"),
    "workpool --help": ("-m", "workpool", "--help"),
    "from workpool import …": ("-c", "from workpool import Supervisor, Settings, handler"),
    "python alone": ("-c", ""),
}


def seconds(arguments: tuple[str, ...]) -> float:
    """Run Python once to its end, and return the seconds that it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)  # noqa: S603 - our own words
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=41, help="processes of each kind")
    runs = parser.parse_args().runs
    for arguments in KINDS.values():
        seconds(arguments)  # the first run compiles the modules
    taken: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(runs):
        for name, arguments in KINDS.items():
            taken[name].append(seconds(arguments))
    unit = statistics.median(taken["import aiohttp"])
    print(versions())
    print(
        table(
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
