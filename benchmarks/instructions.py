"""The cost of an item in user instructions, which no other load on the machine changes.

    python benchmarks/instructions.py [--items FEW MANY] [--only NAME …]

Needs valgrind. Every contender runs twice under callgrind, with FEW and with MANY items. The cost
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
from arena import Meter, Plane, control_plane, enqueue, table, versions
from contenders import Entry, parse_contenders
from parts import ENTRIES

if TYPE_CHECKING:
    from collections.abc import Sequence

WARM_UP = 20
_COLLECTED = re.compile(r"Collected : ([0-9]+)")


def measure(plane: Plane, entry: Entry, items: int) -> int:
    """Return the instructions of a whole process that handles this number of items."""
    uvloop.run(enqueue(plane, items + WARM_UP))
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    command += [__file__, "--child", entry.name, str(items)]
    command += [plane.base_url, plane.anthropic_base_url, plane.token, plane.environment_id]
    done = subprocess.run(  # noqa: S603 - our own interpreter and arguments
        command,
        env=os.environ | {"PYTHONHASHSEED": "0"},  # a random order of sets would add noise
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = _COLLECTED.search(done.stderr)
    assert found is not None
    return int(found[1])


async def child(name: str, items: str, *address: str) -> None:
    """Handle the items, then end. This runs in the process under callgrind."""
    [contender] = [entry.run for entry in ENTRIES if entry.name == name]
    base_url, anthropic_base_url, token, environment_id = address
    plane = Plane(base_url, anthropic_base_url, token, environment_id)
    meter = Meter(WARM_UP, int(items))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(contender(plane, meter), name="contender")
        await meter.done.wait()
        task.cancel()


def report(found: dict[str, float]) -> str:
    """Return the table, which compares each contender with the first one."""
    base = next(iter(found.values()))
    rows = [
        [name, f"{each / 1e6:.3f}", f"{each / base:.2f} ×", f"{(each - base) / 1e6:+.3f}"]
        for name, each in found.items()
    ]
    return table(("contender", "M instructions/item", "ratio", "difference"), rows)


def main(entries: Sequence[Entry]) -> None:
    parser = argparse.ArgumentParser(description="User instructions per item.")
    parser.add_argument("--items", type=int, nargs=2, default=(200, 600), metavar=("FEW", "MANY"))
    options, entries = parse_contenders(parser, "bare", "client only", "workpool", entries=entries)
    few, many = options.items
    with control_plane() as plane:
        found = {
            entry.name: (measure(plane, entry, many) - measure(plane, entry, few)) / (many - few)
            for entry in entries
        }
    print(report(found))
    print(f"\n{many} items less {few}. {versions()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        uvloop.run(child(*sys.argv[2:]))
    else:
        # The bare loop comes first, since the others are compared with the first contender.
        main(sorted(ENTRIES, key=lambda entry: entry.name != "bare"))
