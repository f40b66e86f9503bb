"""Docstrings, comments and texts are plain English with the words of the glossary.

Checks what a program can check: words that no reader expects, and docstrings that are no sentence
of their own. See workpool/docs/contributing.md, "Language".
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKED = (
    "benchmarks/*.py",
    "plugins/*/tests/*.py",
    "plugins/*/workpool_*/**/*.py",
    "tests/**/*.py",
    "workpool/**/*.py",
)
"""Patterns of the modules to which the checks apply, except this one, which lists the words."""
BANNED = {
    r"befall\w*|befell": "literary; write: applies to, affects",
    r"bears?|bore|borne": "literary; write: has, uses",
    r"heed\w*": "archaic; write: obey, notice",
    r"strikes?|struck|striking": "a fault is injected",
    r"deeds?|tenures?|encores?": "literary; write: action, lease, replay",
    r"for want of|lest|hitherto|thereof|whilst|amongst": "archaic",
    r"outruns?|outran": "write: takes longer than",
    r"keepers?": "write: lease renewer",
    r"beats?": "write: heartbeat",
    r"siblings?": "write: the anthropic dialect",
    r"handed over|hands? over|handing over": "write: handed off, hand off",
    r"left behind": "write: abandoned",
}
"""Words that a reader of other projects does not expect, with the reason or the usual word."""
PRONOUN = re.compile(
    r"(?:It|Its|They|Their|This|These|That|Those|He|She|We|Our|Ours|Such|Likewise"
    r"|What|Who|Whom|Whose|How|Why|Where|Somebody|Something|Nobody|Nothing)\b"
)
"""First words without a noun; a question word is a subject that the reader has to work out."""
CITATION = re.compile(r'(?:See )?[\w./-]+\.md, "[^"]+"(?:(?:, | and |, and )"[^"]+")*\.?')


def list_checked_files() -> list[Path]:
    found = {path for pattern in CHECKED for path in ROOT.glob(pattern)}
    return sorted(found - {Path(__file__)})


def list_checked_pages() -> list[Path]:
    patterns = ["README.md", "plugins/*/README.md", "workpool/docs/*.md"]
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def docstrings_by_line(text: str) -> list[tuple[int, str]]:
    """Return the line and text of each docstring, including docstrings of attributes."""
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def find_comments_and_strings(text: str) -> list[tuple[int, str]]:
    """Return the line and text of each comment and string literal."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


def find_banned_words(text: str) -> list[str]:
    return [
        f"{match[0]!r}: {reason}"
        for pattern, reason in BANNED.items()
        for match in re.finditer(rf"(?<![\w`/.-])(?:{pattern})(?![\w`])", text, re.IGNORECASE)
    ]


def find_language_problems(text: str) -> list[str]:
    """Return the language problems of a module, each with its line number."""
    found = [
        f"{line}: {problem}"
        for line, part in find_comments_and_strings(text)
        for problem in find_banned_words(part)
    ]
    for line, docstring in docstrings_by_line(text):
        flat = " ".join(docstring.split())
        if CITATION.fullmatch(flat):
            found.append(f"{line}: the docstring is only a citation")
        if PRONOUN.match(flat):
            found.append(f"{line}: the docstring begins with a pronoun: {flat[:40]!r}")
    return found


def relative_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", list_checked_files(), ids=relative_path)
def test_docstrings_and_comments_of_module_have_no_language_problems(path: Path) -> None:
    assert find_language_problems(path.read_text()) == []


@pytest.mark.parametrize("path", list_checked_pages(), ids=relative_path)
def test_page_text_has_no_banned_words(path: Path) -> None:
    """Code blocks are checked too, but not names in backticks."""
    assert find_banned_words(path.read_text()) == []


def test_test_names_have_three_or_more_words_and_begin_with_no_article() -> None:
    """A name has at least three words, and the first one is neither pronoun nor article.

    The name is all that a report of a failure shows.
    """
    words = {"what", "who", "whatever", "whoever", "nobody", "it", "they", "that", "a", "an", "the"}
    modules = [*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("plugins/*/tests/test_*.py")]
    names = [
        node.name.removeprefix("test_")
        for path in modules
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]
    assert len(names) > 1500
    assert [name for name in names if name.count("_") < 2 or name.split("_")[0] in words] == []


def test_every_banned_word_has_a_reason() -> None:
    assert len(BANNED) < 20
    assert all(reason for reason in BANNED.values())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('"""Return the lease."""', 0),
        ('"""See workpool/docs/architecture.md, "Clocks"."""', 1),
        ('"""What the control plane answers."""', 1),
        ('x = 1\n"""It is one."""', 1),
        ("x = 1  # the keeper knows", 1),
        ("keeper = 1", 0),
        ('x = "a fault strikes"', 1),
        ("# `use_token` quotes a name", 0),
    ],
)
def test_wording_that_the_language_rules_forbid_is_reported(text: str, count: int) -> None:
    assert len(find_language_problems(text + "\n")) == count
