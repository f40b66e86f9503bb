"""The CPU instructions per item: a cost that other load on the machine does not change.

    python benchmarks/cpu_instructions.py [--items FEW MANY] [--only NAME …]

Needs valgrind. Every program runs twice under callgrind, with FEW and with MANY items. The cost
is the difference of the instructions, divided by the difference of the items. It does not include
the kernel's work, which is a part of the CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import uvloop
from benchmark_runs import (
    ControlPlaneAddress,
    ProgramMeter,
    describe_cores_and_versions,
    enqueue_items,
    format_table,
    serve_control_plane,
)
from compared_programs import BenchmarkEntry, parse_selected_programs
from pool_part_costs import ENTRIES

if TYPE_CHECKING:
    from collections.abc import Sequence

WARM_UP = 20
_COLLECTED = re.compile(r"Collected : ([0-9]+)")


def count_instructions(plane: ControlPlaneAddress, entry: BenchmarkEntry, items: int) -> int:
    """Return how many instructions a process executes to start and to run the items."""
    uvloop.run(enqueue_items(plane, items + WARM_UP))
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    command += [__file__, "--child", entry.name, str(items)]
    command += [plane.base_url, plane.anthropic_base_url, plane.token, plane.environment_id]
    done = subprocess.run(  # noqa: S603 - our own interpreter and arguments
        command,
        env=os.environ
        | {"PYTHONHASHSEED": "0"},  # random hashes would change the number of instructions
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = _COLLECTED.search(done.stderr)
    assert found is not None
    return int(found[1])


async def run_items_under_callgrind(name: str, items: str, *address: str) -> None:
    """Handle the items and exit, as the child process under callgrind."""
    [program] = [entry.run for entry in ENTRIES if entry.name == name]
    base_url, anthropic_base_url, token, environment_id = address
    plane = ControlPlaneAddress(base_url, anthropic_base_url, token, environment_id)
    meter = ProgramMeter(WARM_UP, int(items))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(program(plane, meter), name="program")
        await meter.done.wait()
        task.cancel()


def format_report(found: dict[str, float]) -> str:
    """Return the table, which compares each program with the first one."""
    base = next(iter(found.values()))
    rows = [
        [name, f"{each / 1e6:.3f}", f"{each / base:.2f} ×", f"{(each - base) / 1e6:+.3f}"]
        for name, each in found.items()
    ]
    return format_table(("program", "M instructions/item", "ratio", "difference"), rows)


def main(entries: Sequence[BenchmarkEntry]) -> None:
    parser = argparse.ArgumentParser(description="User instructions per item.")
    parser.add_argument("--items", type=int, nargs=2, default=(200, 600), metavar=("FEW", "MANY"))
    options, entries = parse_selected_programs(
        parser, "bare", "client only", "workpool", entries=entries
    )
    few, many = options.items
    with serve_control_plane() as plane:
        found = {
            entry.name: (
                count_instructions(plane, entry, many) - count_instructions(plane, entry, few)
            )
            / (many - few)
            for entry in entries
        }
    print(format_report(found))
    print(f"\n{many} items less {few}. {describe_cores_and_versions()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        uvloop.run(run_items_under_callgrind(*sys.argv[2:]))
    else:
        # Put the bare loop first: the table compares all programs with the first one.
        main(sorted(ENTRIES, key=lambda entry: entry.name != "bare"))
