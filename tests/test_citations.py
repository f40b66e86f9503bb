"""Every document and heading that the code cites must exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.names_in_source import NamesInSource, find_missing_names
from workpool.pool.completion import TABLE
from workpool.pool.pool_item import TRANSITIONS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "workpool"
MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "plugins").glob("*/workpool_*/**/*.py")])
TEST_MODULES = sorted((ROOT / "tests").rglob("*.py"))
UNCHECKED = ("workpool/cli/new.py",)
"""Modules in which mentions of documents are not checked.

One names the README that it generates.
"""
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yml", ".in", ".sql", ".txt", ""}
DOCUMENTS = sorted((PACKAGE / "docs").glob("*.md"))
ARCHITECTURE = (PACKAGE / "docs/architecture.md").read_text()

# Matches: See workpool/docs/NAME.md, "Heading" and "Another heading".
CITATION = re.compile(r'([\w./-]+\.md), ("[^"]+"(?:(?:, | and |, and )"[^"]+")*)')
OUTSIDE = re.compile(
    r"§|\bD\d+\b|\bissue #?\d|/work/|\b(?:design|protocol|metrics|style)\.md|\bREADME\b(?!\.md, \")"
)
"""Matches citations of documents outside the repository, and of decisions by their numbers."""


def text_without_line_breaks(text: str) -> str:
    """Join the lines of comments and docstrings, so that a citation may span lines."""
    return re.sub(r"\s*\n\s*(?:# ?)?", " ", text)


def find_cited_headings(text: str) -> list[tuple[str, str]]:
    """Return the citations in a text, each as a pair of document and heading."""
    return [
        (path, heading)
        for path, quoted in CITATION.findall(text_without_line_breaks(text))
        for heading in re.findall(r'"([^"]+)"', quoted)
    ]


def read_document_headings(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^#+ (.+)$", text, re.MULTILINE))


def find_unresolved_citations(text: str) -> list[tuple[str, str]]:
    """Return the citations whose document or heading does not exist."""
    return [
        (path, heading)
        for path, heading in find_cited_headings(text)
        if not (ROOT / path).is_file() or heading not in read_document_headings(ROOT / path)
    ]


def find_malformed_mentions(text: str) -> list[str]:
    """Return the words that mention a document but belong to no valid citation."""
    rest = CITATION.sub("", text_without_line_breaks(text))
    return OUTSIDE.findall(rest) + re.findall(r"[\w./-]+\.md\b", rest)


def relative_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_each_citation_in_a_module_names_an_existing_heading_of_the_documentation() -> None:
    modules = [*MODULES, *(path for path in TEST_MODULES if path != Path(__file__))]
    found = {relative_path(path): find_unresolved_citations(path.read_text()) for path in modules}
    assert {path: each for path, each in found.items() if each} == {}


@pytest.mark.parametrize(
    ("part", "document", "heading"),
    [
        ("pool", "architecture", "The path of one item"),
        ("wire", "protocol", "Dialects"),
        ("server", "protocol", "States and leases"),
        ("conformance", "protocol", "Leases"),
    ],
)
def test_modules_of_subpackage_cite_the_document_about_that_subpackage(
    part: str, document: str, heading: str
) -> None:
    modules = (PACKAGE / part).rglob("*.py")
    cited = {each for path in modules for each in find_cited_headings(path.read_text())}
    assert (f"workpool/docs/{document}.md", heading) in cited
    assert len(cited) > 5


@pytest.mark.parametrize(
    "path",
    [each for each in MODULES if not relative_path(each).startswith(UNCHECKED)],
    ids=relative_path,
)
def test_module_cites_only_documents_of_this_repository(path: Path) -> None:
    assert find_malformed_mentions(path.read_text()) == []


def test_no_file_cites_a_document_outside_repository() -> None:
    """All tracked files are checked, such as configuration, templates and pages."""
    names = ["README.md", "CHANGELOG.md", "pyproject.toml", ".ci", "benchmarks", "plugins", "tests"]
    files = [
        file
        for path in (ROOT / name for name in [*names, "workpool"])
        for file in (path.rglob("*") if path.is_dir() else [path])
        if file.is_file() and file.suffix in TEXT_SUFFIXES and file != Path(__file__)
    ]
    assert len(files) > 300
    assert [relative_path(file) for file in files if "§" in file.read_text()] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('See workpool/docs/architecture.md, "Clocks".', []),
        ('See workpool/docs/architecture.md, "Clocks" and\n# "Renewals".', []),
        ('See workpool/docs/architecture.md, "Renewals"\n    and "Clocs".', ["Clocs"]),
        ('See workpool/docs/absent.md, "Clocks".', ["Clocks"]),
        ('See docs/architecture.md, "Clocks".', ["Clocks"]),
    ],
)
def test_citation_of_missing_heading_is_reported(text: str, found: list[str]) -> None:
    assert [heading for _, heading in find_unresolved_citations(text)] == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the first poll (design §1, Claim)", ["§"]),
        ("as protocol.md says", ["protocol.md", "protocol.md"]),
        ("a decision, see README, D15", ["README", "D15"]),
        ("see workpool/docs/architecture.md", ["workpool/docs/architecture.md"]),
        ("TID251 is a rule", []),
        ('See README.md, "Semantics".', []),
    ],
)
def test_malformed_citation_in_text_is_reported(text: str, found: list[str]) -> None:
    assert find_malformed_mentions(text) == found


def read_architecture_table_rows(first_column: str) -> list[list[str]]:
    """Return the rows of the architecture page's table whose first column is `first_column`."""
    table = ARCHITECTURE.partition(f"| {first_column} |")[2].partition("\n\n")[0]
    lines = table.splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative_path)
def test_every_file_that_document_names_exists(document: Path) -> None:
    text = document.read_text()
    named = set(re.findall(r"`((?:workpool|tests|benchmarks)/[\w./-]*)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative_path)
def test_link_inside_document_leads_to_heading(document: Path) -> None:
    anchors = {
        re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-")
        for each in read_document_headings(document)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", document.read_text())) <= anchors


def test_documented_item_state_transitions_equal_transitions_in_code() -> None:
    documented = {
        (state, transition): then
        for state, transition, then, _ in read_architecture_table_rows("state")
    }
    assert documented == TRANSITIONS


def test_documented_end_reasons_equal_end_reasons_in_code() -> None:
    documented = [tuple(row) for row in read_architecture_table_rows("end reason")]
    assert documented == [
        (reason.name, row.item, row.metadata, row.outcome) for reason, row in sorted(TABLE.items())
    ]


def test_documented_constants_have_values_of_code() -> None:
    constants = read_architecture_table_rows("constant")
    assert constants
    for name, value in constants:
        module, _, attribute = name.partition(".")
        found = getattr(importlib.import_module(f"workpool.pool.{module}"), attribute)
        assert ast.literal_eval(value) == found, name


PAGES_WITH_CHECKED_NAMES = (
    "architecture",
    "contributing",
    "control-plane",
    "glossary",
    "semantics",
    "simulation",
)
NAMES_OF_OTHERS = {
    "CLOCK_MONOTONIC": "a clock of the operating system",
    "NOTIFY": "a statement of PostgreSQL",
    "busybox": "a package of the operating system",
    "call_soon_threadsafe": "a method of asyncio's event loop",
    "debootstrap": "a package of the operating system",
    "noqa": "a comment that ruff reads",
    "ripgrep": "a package of the operating system",
    "runc": "a package of the operating system",
}
"""Names in the pages that the source does not define, and whose they are."""


@pytest.fixture(scope="module")
def names_in_source() -> NamesInSource:
    return NamesInSource()


@pytest.mark.parametrize("page", PAGES_WITH_CHECKED_NAMES)
def test_code_names_in_page_exist_in_source(page: str, names_in_source: NamesInSource) -> None:
    text = (PACKAGE / f"docs/{page}.md").read_text()
    missing = find_missing_names(text, names_in_source)
    assert [name for name in missing if name not in NAMES_OF_OTHERS] == []


@pytest.mark.parametrize(
    "name",
    [
        "Lease.no_such_name",
        "executing",
        "no_such_module.py",
        "remove_lease",  # The name of a method must include its class.
        "workpool/pool/absent.py",
    ],
)
def test_documented_name_that_the_source_lacks_is_reported_as_missing(
    name: str, names_in_source: NamesInSource
) -> None:
    assert find_missing_names(f"The call of `{name}` comes first.", names_in_source) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "HandoffChildSupervisor.request_drain()",  # The method is inherited from a base class.
        "LeaseRenewer.remove_lease",
        "PoolItem.state",
        "hand_off",
        "item_cache.py",
        "queued",
        "time.sleep",
    ],
)
def test_documented_name_that_the_source_defines_is_not_reported_as_missing(
    name: str, names_in_source: NamesInSource
) -> None:
    assert find_missing_names(f"The call of `{name}` comes first.", names_in_source) == []
