"""`glob` and `grep`, with ripgrep in a sandbox and with the walker without."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from workpool_toolset import search, walker

if TYPE_CHECKING:
    from pathlib import Path


def plant(folder: Path) -> None:
    for number, name in enumerate(["a.py", "b.txt", "src/c.py", "src/deep/d.py", ".git/e.py"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import x{number}\nlast line of {name}")
        os.utime(path, (1000 + number, 1000 + number))
    (folder / "src/link.py").symlink_to("../a.py")
    (folder / "binary").write_bytes(b"import \0")
    (folder / "wide").write_bytes(b"import " + b"x" * 3000 + b"\nimport narrow\n")
    (folder / "latin").write_bytes(b"import caf\xe9\n")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.py", ["a.py"]),
        ("**/*.py", [".git/e.py", "src/deep/d.py", "src/c.py", "a.py"]),
        ("src/**", ["src/deep/d.py", "src/c.py"]),
        ("./src/*.py", ["src/c.py"]),
        ("**/deep/**/d.py", ["src/deep/d.py"]),
        ("src/[cd].p?", ["src/c.py"]),
        ("*.rs", ["no matches"]),
    ],
)
async def test_glob(bare: Any, folder: Path, pattern: str, found: list[str]) -> None:
    plant(folder)
    said = (await bare.says("Glob", pattern=pattern)).splitlines()
    assert [path for path in said if path != "src/link.py"] == found


async def test_glob_below_a_directory_and_at_most_200(bare: Any, folder: Path) -> None:
    plant(folder)
    assert await bare.says("glob", pattern="*.py", path="src/deep") == "src/deep/d.py\n"
    for number in range(250):
        (folder / f"n{number}.log").touch()
        os.utime(folder / f"n{number}.log", (number, number))
    said = (await bare.says("glob", pattern="*.log")).splitlines()
    assert said == [f"n{number}.log" for number in range(249, 49, -1)]
    assert "not a directory" in await bare.fails("glob", pattern="*", path="a.py")


async def test_grep_without_ripgrep(bare: Any, folder: Path) -> None:
    plant(folder)
    said = await bare.says("Grep", pattern=r"import x\d")
    assert said.splitlines() == [
        *("a.py:1:import x0", "b.txt:1:import x1", "src/c.py:1:import x2"),
        "src/deep/d.py:1:import x3",
    ]
    assert await bare.says("grep", pattern="import n") == "wide:2:import narrow\n"
    await common(bare)
    assert "not a regular expression" in await bare.fails("grep", pattern="(")


@pytest.mark.skipif(not search.RIPGREP.exists(), reason="ripgrep is not installed")
async def test_grep_with_ripgrep(boxed: Any, folder: Path) -> None:
    plant(folder)
    said = await boxed.says("Grep", pattern=r"import x\d")
    assert said.splitlines() == [
        *("a.py:1:import x0", "b.txt:1:import x1", "src/c.py:1:import x2"),
        "src/deep/d.py:1:import x3",
    ]
    await common(boxed)
    assert "grep:" in await boxed.fails("grep", pattern="(")


async def common(agent: Any) -> None:
    assert await agent.says("grep", pattern="last", path="src/deep") == (
        "src/deep/d.py:2:last line of src/deep/d.py\n"
    )
    assert await agent.says("grep", pattern="last", path="a.py") == "a.py:2:last line of a.py\n"
    assert await agent.says("grep", pattern="import", include="*.txt") == "b.txt:1:import x1\n"
    assert await agent.says("grep", pattern="nowhere to be found") == "no matches"
    assert "latin:1:import caf" in await agent.says("grep", pattern="import caf")
    assert "no such file" in await agent.fails("grep", pattern="x", path="missing")


async def test_much_output_is_cut_after_100_kib(agent: Any, folder: Path) -> None:
    (folder / "many").write_text("the same line again\n" * 50_000)
    said = await agent.says("grep", pattern="same")
    assert 90_000 < len(said) < 103_000
    assert said.endswith("the same line again\n[output truncated]\n")


async def test_a_regex_without_end_is_ended(
    bare: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SEARCH_SECONDS", 0.5)
    (folder / "a").write_text("a" * 40 + "b")
    assert "took more than" in await bare.fails("grep", pattern="(a+)+$")


def test_the_walker_stops_at_its_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (folder / f"f{number}").touch()
    monkeypatch.setattr(walker, "ENTRIES", 7)
    deep = folder / "/".join("d" * 110)
    deep.mkdir(parents=True)
    (deep / "bottom").touch()
    directory = os.open(folder, os.O_RDONLY)
    try:
        assert len(list(walker.walk(directory, set()))) <= 7
        monkeypatch.setattr(walker, "ENTRIES", 1000)
        names = {found.name for found in walker.walk(directory, set())}
        assert names == {f"f{number}" for number in range(20)}
    finally:
        os.close(directory)
