"""Check that the benchmarks run and print their tables; the figures are not checked."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.postgres.cluster import PostgresMissingError, postgres_program_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def skip_without_postgres() -> None:
    try:
        postgres_program_folder()
    except PostgresMissingError as missing:
        pytest.skip(str(missing))


async def run_benchmark_and_read_rows(
    script: str, *options: str, only: tuple[str, ...] = ("bare", "workpool")
) -> list[list[str]]:
    """Run a benchmark and return the cells of its table, without the header lines."""
    selection = ("--only", *only) if only else ()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(BENCHMARKS / script), *options, *selection),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    lines = [line for line in output.decode().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_throughput_benchmark_compares_pool_with_handwritten_loop() -> None:
    bare, pool = await run_benchmark_and_read_rows(
        "throughput.py", "--items", "40", "--rounds", "2"
    )
    assert bare[:2] == ["bare", "40"]
    assert pool[:2] == ["workpool", "40"]
    assert bare[3] == bare[5] == "1.00 ×"
    assert all(float(cell) > 0 for cell in (bare[2], bare[4], pool[2], pool[4]))
    assert all(re.fullmatch(r"\d+\.\d\d ×", cell) for cell in (pool[3], pool[5]))


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_latency_benchmark_counts_every_item_of_pool_and_handwritten_loop() -> None:
    bare, pool = await run_benchmark_and_read_rows(
        "latency.py", "--items", "20", "--rounds", "1", "--gaps", "idle"
    )
    assert bare[:3] == ["idle", "bare", "20"]
    assert pool[:3] == ["idle", "workpool", "20"]
    for cells in (bare, pool):
        p50, p99, most = float(cells[3]), float(cells[5]), float(cells[7])
        assert 0 < p50 <= p99 <= most


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_idle_benchmark_counts_requests_of_pool_and_handwritten_loop() -> None:
    found = await run_benchmark_and_read_rows(
        "idle_workers.py", "--seconds", "1.5", "--settle", "0"
    )
    assert [cells[0] for cells in found] == ["bare", "workpool"]
    for _, requests, cpu, memory in found:
        assert float(requests) > 0
        assert float(cpu) >= 0
        assert float(memory) > 1


@pytest.mark.trial
@pytest.mark.timeout(120)
@pytest.mark.parametrize("program", ["bare", "workpool"])
async def test_leases_benchmark_reports_no_lost_lease(program: str) -> None:
    options = ("--leases", "3", "--seconds", "0.2", "--settle", "0")
    [cells] = await run_benchmark_and_read_rows("leases.py", *options, only=(program,))
    assert cells[:2] == [program, "3"]
    assert cells[-1] == "0"  # The last cell of a row is the number of lost leases.


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_drain_benchmark_reports_no_abandoned_session() -> None:
    found = await run_benchmark_and_read_rows(
        "drain.py", "--sessions", "5", "10", "--rounds", "1", only=()
    )
    expected = [[end, number] for end in ("return", "release") for number in ("5", "10")]
    assert [cells[:2] for cells in found] == expected
    assert {cells[-1] for cells in found} == {"0"}


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_growth_benchmark_prints_memory_of_every_sample() -> None:
    options = ("--sessions", "60", "--warm-up", "20", "--samples", "3")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(BENCHMARKS / "resource_growth.py"), *options),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert re.findall(r"^\| (\d+) ", output.decode(), re.MULTILINE) == ["20", "40", "60"]


PARTS = ("workpool", "metrics off", "a wrapper", "one loop")


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_benchmark_of_pool_parts_prints_one_row_for_each_variant_of_pool() -> None:
    found = await run_benchmark_and_read_rows(
        "pool_part_costs.py", "--items", "10", "--rounds", "1", only=PARTS
    )
    assert sorted(cells[0] for cells in found) == sorted(PARTS)
    assert found[0][0] == "workpool"
    assert all(cells[1] == "10" and float(cells[2]) > 0 for cells in found)


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_function_calls_benchmark_lists_source_files_executed_for_one_item() -> None:
    bare, pool, *files = await run_benchmark_and_read_rows(
        "function_calls_per_item.py", "--items", "20", "--by-file"
    )
    assert bare[:4] == ["bare", "0", "0", "0"]
    assert pool[0] == "workpool"
    counted = files[2:]  # The first two rows are the header of the second table.
    assert len(counted) == int(pool[1])
    assert sum(int(functions) for _, functions, _ in counted) == int(pool[2])
    assert float(pool[4]) > float(bare[4])
    names = {name for name, *_ in counted}
    assert {"pool/poller.py", "pool/claim.py", "pool/completion.py", "wire/client.py"} <= names
    # diagnostics.py runs once a second, not once an item, so the benchmark must not list it.
    assert "pool/diagnostics.py" not in names


async def test_help_text_of_cpu_benchmark_lists_handwritten_loop_and_all_pool_variants() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(BENCHMARKS / "cpu_instructions.py"), "--help"),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    for name in ("bare", *PARTS):
        assert name in output.decode()


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_start_benchmark_compares_start_of_workpool_with_import_of_aiohttp() -> None:
    found = {
        name: cells
        for name, *cells in await run_benchmark_and_read_rows(
            "process_start.py", "--runs", "3", only=()
        )
    }
    assert found["import aiohttp"][2] == "1.00 ×"
    ratios = {name: float(cells[2].split()[0]) for name, cells in found.items()}
    assert {"workpool --help", "from workpool import …"} <= set(ratios)
    assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.trial
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("store", "nodes"), [("memory", "1"), ("sqlite", "1"), ("postgres-2", "2")]
)
async def test_control_plane_benchmark_measures_databases_full_of_stopped_items(
    store: str, nodes: str
) -> None:
    if store.startswith("postgres"):
        skip_without_postgres()
    options = ("--items", "40", "--stopped-rows", "3", "2000", "--rounds", "1", "--workers", "2")
    few, many = await run_benchmark_and_read_rows("control_plane.py", *options, only=(store,))
    assert few[1:4] == [nodes, "3", "40"]
    assert many[1:4] == [nodes, "2000", "40"]
    assert all(float(cells[8]) > 0 for cells in (few, many))


@pytest.mark.trial
@pytest.mark.timeout(300)
@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_scaling_benchmark_prints_one_row_for_each_given_size(store: str) -> None:
    sizes = ("--workers", "2", "--leases", "3", "--streams", "4", "--depths", "10", "50")
    options = ("--items", "30", *sizes, "--seconds", "0.2", "--settle", "0", "--stores", store)
    found = await run_benchmark_and_read_rows(
        "control_plane_scaling.py", *options, only=("workers", "leases", "streams", "depth")
    )
    tables = [cells[1:] for cells in found if cells[1].isdigit()]
    assert [cells[1] for cells in tables] == ["2", "3", "4", "10", "50"]
    assert [cells[-1] for cells in tables[1:3]] == ["0", "0"]
