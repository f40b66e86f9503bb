"""Tests of the tools `glob` and `grep`, with ripgrep in a sandbox and without ripgrep."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from workpool_toolset import search_tools, walker
from workpool_toolset.workspace import WorkspaceRoot

if TYPE_CHECKING:
    from pathlib import Path


def create_files(directory: Path) -> None:
    for number, name in enumerate(["a.py", "b.txt", "src/c.py", "src/deep/d.py", ".git/e.py"]):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import x{number}\nlast line of {name}")
        os.utime(path, (1000 + number, 1000 + number))
    (directory / "src/link.py").symlink_to("../a.py")
    (directory / "binary").write_bytes(b"import \0")
    (directory / "wide").write_bytes(b"import " + b"x" * 3000 + b"\nimport narrow\n")
    (directory / "latin").write_bytes(b"import caf\xe9\n")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.py", ["a.py"]),
        ("**/*.py", [".git/e.py", "src/deep/d.py", "src/c.py", "a.py"]),
        ("src/**/*.*", ["src/deep/d.py", "src/c.py"]),
        ("{a,src/?}.{py,rs}", ["src/c.py", "a.py"]),
        ("./src/*.py", ["src/c.py"]),
        ("**/deep/**/d.py", ["src/deep/d.py"]),
        ("src/[cd].p?", ["src/c.py"]),
        ("*.rs", ["no matches"]),
    ],
)
async def test_glob_pattern_finds_matching_files_newest_first(
    agent_without_sandbox: Any, workspace_directory: Path, pattern: str, found: list[str]
) -> None:
    create_files(workspace_directory)
    output = (await agent_without_sandbox.expect_tool_success("Glob", pattern=pattern)).splitlines()
    assert [path for path in output if path != "src/link.py"] == found


async def test_glob_lists_directories_and_follows_links_inside_workspace(
    agent: Any, workspace_directory: Path, tmp_path: Path
) -> None:
    (workspace_directory / "src/deep").mkdir(parents=True)
    (workspace_directory / "src/deep/file").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").touch()
    os.mkfifo(workspace_directory / "src/pipe")
    links: dict[str, str | Path] = {
        "to-file": "deep/file",
        "to-directory": "deep",
        "absolute": f"{agent.shown}/src/deep",
        "chain": "../src/to-directory/../to-file",
        "to-pipe": "pipe",
        "up": "..",
        "self": "self",
        "dangling": "nothing",
        "leaves": tmp_path / "outside",
        "leaves-to-file": "../../outside/secret",
        "device": "/dev/zero",
    }
    for name, target in links.items():
        (workspace_directory / "src" / name).symlink_to(target)
    found = set((await agent.expect_tool_success("glob", pattern="src/**")).splitlines())
    assert {
        *("src/deep", "src/deep/file", "src/to-file", "src/to-directory", "src/chain", "src/up"),
        *("src/absolute", "src/up/src/deep/file"),
    } <= found
    # Two links lead to one directory. The search enters this directory through only one link.
    entered = {"src/absolute/file", "src/to-directory/file"}
    assert len(entered & found) == 1
    shown = str(found)
    assert not any(name in shown for name in ("pipe", "self", "dangling", "leaves", "device"))
    assert (
        await agent.expect_tool_success("glob", pattern="*", path="src/to-directory")
        == "src/deep/file\n"
    )
    assert (
        await agent.expect_tool_success("glob", pattern="**/chain")
        == "src/chain\nsrc/up/src/chain\n"
    )
    assert (await agent.expect_tool_success("glob", pattern="*")).splitlines() == ["src"]


async def test_glob_skips_link_out_of_workspace_unless_it_leads_to_allowed_root(
    fake_agent_factory: Any, workspace_directory: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    (shared / "inner").mkdir(parents=True)
    (shared / "inner/file").touch()
    (workspace_directory / "link").symlink_to(shared / "inner")
    assert await fake_agent_factory().expect_tool_success("glob", pattern="**") == "no matches"
    agent = fake_agent_factory(roots=[WorkspaceRoot(str(shared), shared)])
    assert set((await agent.expect_tool_success("glob", pattern="**")).splitlines()) == {
        "link",
        "link/file",
    }


async def test_glob_below_directory_returns_at_most_200_newest_paths(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    create_files(workspace_directory)
    assert (
        await agent_without_sandbox.expect_tool_success("glob", pattern="*.py", path="src/deep")
        == "src/deep/d.py\n"
    )
    for number in range(250):
        (workspace_directory / f"n{number}.log").touch()
        os.utime(workspace_directory / f"n{number}.log", (number, number))
    output = (await agent_without_sandbox.expect_tool_success("glob", pattern="*.log")).splitlines()
    assert output == [f"n{number}.log" for number in range(249, 49, -1)]
    assert "not a directory" in await agent_without_sandbox.expect_tool_error(
        "glob", pattern="*", path="a.py"
    )


async def test_grep_without_ripgrep_finds_matching_lines(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    create_files(workspace_directory)
    output = await agent_without_sandbox.expect_tool_success("Grep", pattern=r"import x\d")
    assert output.splitlines() == [
        *("a.py:1:import x0", "b.txt:1:import x1", "src/c.py:1:import x2"),
        "src/deep/d.py:1:import x3",
    ]
    assert (
        await agent_without_sandbox.expect_tool_success("grep", pattern="import n")
        == "wide:2:import narrow\n"
    )
    await assert_grep_finds_expected_matches(agent_without_sandbox)
    assert "not a regular expression" in await agent_without_sandbox.expect_tool_error(
        "grep", pattern="("
    )


@pytest.mark.skipif(not search_tools.RIPGREP.exists(), reason="ripgrep is not installed")
async def test_grep_with_ripgrep_finds_matching_lines(
    agent_with_sandbox: Any, workspace_directory: Path
) -> None:
    create_files(workspace_directory)
    output = await agent_with_sandbox.expect_tool_success("Grep", pattern=r"import x\d")
    assert output.splitlines() == [
        *("a.py:1:import x0", "b.txt:1:import x1", "src/c.py:1:import x2"),
        "src/deep/d.py:1:import x3",
    ]
    await assert_grep_finds_expected_matches(agent_with_sandbox)
    assert "not a regular expression" in await agent_with_sandbox.expect_tool_error(
        "grep", pattern="("
    )


async def assert_grep_finds_expected_matches(agent: Any) -> None:
    assert await agent.expect_tool_success("grep", pattern="last", path="src/deep") == (
        "src/deep/d.py:2:last line of src/deep/d.py\n"
    )
    assert (
        await agent.expect_tool_success("grep", pattern="last", path="a.py")
        == "a.py:2:last line of a.py\n"
    )
    assert (
        await agent.expect_tool_success("grep", pattern="import", include="*.txt")
        == "b.txt:1:import x1\n"
    )
    assert await agent.expect_tool_success("grep", pattern="nowhere to be found") == "no matches"
    assert "latin:1:import caf" in await agent.expect_tool_success("grep", pattern="import caf")
    assert "no such file" in await agent.expect_tool_error("grep", pattern="x", path="missing")


EXPECTED_LINES: list[tuple[dict[str, str], list[str]]] = [
    ({"pattern": "word"}, [".env:1", ".hidden/a.txt:1", "b.min.js:1", "crlf.txt:1", "d/e.py:1"]),
    ({"pattern": "word$"}, [".env:1", ".hidden/a.txt:1", "b.min.js:1", "crlf.txt:1", "d/e.py:1"]),
    ({"pattern": "end$", "path": "crlf.txt"}, ["crlf.txt:2"]),
    ({"pattern": "(?<=wo)rd", "include": "*.py"}, ["d/e.py:1"]),
    ({"pattern": r"(o)rd\n?", "include": "*.py"}, ["d/e.py:1"]),
    ({"pattern": r"(s)\1"}, ["d/e.py:2"]),
    ({"pattern": "word", "include": "*.{py,js}"}, ["b.min.js:1", "d/e.py:1"]),
    ({"pattern": "word", "include": "d/*.py"}, ["d/e.py:1"]),
    ({"pattern": "word", "include": "*.py", "path": "d"}, ["d/e.py:1"]),
    ({"pattern": "word", "include": "d/*.py", "path": "d"}, []),
    ({"pattern": "word", "include": "**/*.py", "path": "d"}, ["d/e.py:1"]),
    ({"pattern": "word", "include": "/*.js"}, ["b.min.js:1"]),
    ({"pattern": "word", "include": "!*.{txt,js}"}, [".env:1", "d/e.py:1"]),
    (
        {"pattern": "word", "include": "!d"},
        [".env:1", ".hidden/a.txt:1", "b.min.js:1", "crlf.txt:1"],
    ),
    ({"pattern": "word", "include": "[!b]*.??"}, ["d/e.py:1"]),
    ({"pattern": "word", "include": "["}, []),
    ({"pattern": "odd", "include": "odd[*]{}*"}, ["odd*{}!:1"]),
    ({"pattern": "odd", "path": "odd [d]{}", "include": "*/f"}, ["odd [d]{}/x/f:1"]),
    ({"pattern": "word", "include": "*.py", "path": "crlf.txt"}, []),
    ({"pattern": "word", "path": "d/e.py"}, ["d/e.py:1"]),
    ({"pattern": "binary"}, []),
    ({"pattern": "binary", "path": "late"}, []),
    ({"pattern": "narrow|x{50}"}, ["wide:2"]),
    ({"pattern": "word", "path": "node_modules"}, ["node_modules/n.js:1"]),
    ({"pattern": "utf16"}, []),
    ({"pattern": ".", "include": "dots"}, ["dots:1"]),
]


@pytest.mark.parametrize(("fields", "found"), EXPECTED_LINES, ids=str)
async def test_grep_with_and_without_sandbox_finds_the_same_lines(
    agent: Any, workspace_directory: Path, fields: dict[str, str], found: list[str]
) -> None:
    contents = {
        ".env": b"word\n",
        ".hidden/a.txt": b"word\n",
        ".git/config": b"word\n",
        ".gitignore": b"*.js\nd/\n",
        ".ignore": b".env\n",
        "node_modules/n.js": b"word\n",
        "b.min.js": b"word\n",
        "crlf.txt": b"word\r\nend\r\n",
        "d/e.py": b"word\nclasses\n",
        "dots": b"." * 2000,
        "odd*{}!": b"odd\n",
        "odd [d]{}/x/f": b"odd\n",
        "late": b"binary\n" + b"y" * 200_000 + b"\n\0\nbinary\n",
        "utf16": "\ufeffutf16\n".encode("utf-16"),
        "wide": b"x" * 3000 + b"\nnarrow\n",
    }
    for name, content in contents.items():
        (workspace_directory / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace_directory / name).write_bytes(content)
    output = await agent.expect_tool_success("grep", **fields)
    lines = [] if output == "no matches" else output.splitlines()
    assert [":".join(line.split(":")[:2]) for line in lines] == found
    assert not any(line.endswith("\r") for line in output.split("\n"))


@pytest.mark.parametrize("pattern", ["(", "[", "a{2,1}", "(?<=a", r"(\1", "(?P<", "*a"])
async def test_grep_error_for_invalid_expression_names_no_ripgrep_option(
    agent: Any, pattern: str
) -> None:
    output = await agent.expect_tool_error("grep", pattern=pattern)
    assert output.startswith("not a regular expression: ")
    assert not re.search("rg|ripgrep|--|pcre|-U", output, re.IGNORECASE)


async def test_grep_that_searches_no_file_reports_no_matches_but_still_checks_pattern(
    agent: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "a").write_text("word")
    assert await agent.expect_tool_success("grep", pattern="word", include="*.none") == "no matches"
    assert await agent.expect_tool_error("grep", pattern="a\0b") == "the pattern holds a NUL"


async def test_grep_whose_sandbox_does_not_start_fails(
    agent_with_sandbox: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "a").write_text("word")
    tools = agent_with_sandbox.toolbox._search
    tools._sandboxed = search_tools.SandboxCommand(["/bin/false"], {})
    assert await agent_with_sandbox.expect_tool_error("grep", pattern="word") == "the search failed"


async def test_grep_output_is_cut_after_100_kib(agent: Any, workspace_directory: Path) -> None:
    (workspace_directory / "many").write_text("the same line again\n" * 50_000)
    output = await agent.expect_tool_success("grep", pattern="same")
    assert 90_000 < len(output) < 103_000
    assert output.endswith("the same line again\n[output truncated]\n")


async def test_grep_with_endless_expression_ends_at_time_limit(
    agent_without_sandbox: Any, workspace_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_tools, "SEARCH_SECONDS", 0.5)
    (workspace_directory / "a").write_text("a" * 40 + "b")
    assert "took more than" in await agent_without_sandbox.expect_tool_error(
        "grep", pattern="(a+)+$"
    )


def test_directory_walk_stops_at_limits_of_entries_and_depth(
    workspace_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (workspace_directory / f"f{number}").touch()
    monkeypatch.setattr(walker, "MAX_ENTRIES", 7)
    deep = workspace_directory / "/".join("d" * 110)
    deep.mkdir(parents=True)
    (deep / "bottom").touch()
    directory = os.open(workspace_directory, os.O_RDONLY)
    try:
        start = walker.SearchedDirectory(directory, (), "/")
        assert len(list(walker.DirectoryWalk(set()).list_entries_below(start))) <= 7
        monkeypatch.setattr(walker, "MAX_ENTRIES", 1000)
        names = {found.name for found in walker.DirectoryWalk(set()).list_entries_below(start)}
        assert names == {"d"} | {f"f{number}" for number in range(20)}
    finally:
        os.close(directory)
