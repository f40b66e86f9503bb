"""Checks the rules for the architecture: names, imports, exceptions and suppressions."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_args

import pytest

import workpool
from workpool import hookspecs
from workpool.wire.protocol import Dialect

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "workpool"
MODULES = sorted(PACKAGE.rglob("*.py"))
PLUGIN_MODULES = sorted((ROOT / "plugins").glob("*/workpool_*/**/*.py"))
PUBLIC = {"workpool", "workpool.errors", "workpool.events", "workpool.settings"}
BANNED = {
    "manager",
    "helper",
    "util",
    "common",
    "base",
    "core",
    "misc",
    "processor",
    "data",
    "info",
    "types",
}
SUPPRESSIONS_PER_1000_LINES = 3
LOOPS = (
    "pool/poller.py",
    "pool/lease.py",
    "pool/dispatcher.py",
    "pool/supervisor.py",
    "pool/lease_renewer.py",
)
MODULES_WITH_BROAD_EXCEPT = {
    "logs.py",  # A `__str__` method that raises must not prevent the log line.
    "metrics/observer.py",  # An error in a metric must not end the pool.
    # Any error of a handler is replaced by `Release` if the machine has run out of resources.
    "session.py",
    # The evaluation of a plugin's annotation may raise any error; it is reported as PluginError.
    "plugins/loading.py",
    "pool/handler_executor.py",  # Any error of a handler must fail only its own session.
    # Any error of a plain handler is caught on its thread and raised again in its task.
    "pool/handler_threads.py",
    "plugins/discovery.py",  # Any error of a plugin hook must be reported with the plugin's name.
    "pool/poller.py",  # An error in one poll must not end the poller.
    "pool/item_requests.py",  # An error in one heartbeat must not end other heartbeats.
    "pool/lease_renewer.py",  # Any error of the renewer thread is raised on the handlers' loop.
    # Any error of the thread that writes a report is raised on the thread that requested it.
    "pool/diagnostics.py",
    # Any error of the store's writer thread must be raised on the event loop.
    "server/stores/sqlite.py",
    # If the check before a request fails, its error is raised instead of aiohttp's error.
    "wire/http/checked_request.py",
    # Any error on a daemon thread is raised where the result of the thread's function is awaited.
    "wire/http/daemon_threads.py",
    "cli/environment_group.py",  # An error of one environment must not end the others.
}


def relative_path(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def words_in_name(name: str) -> set[str]:
    return {word.lower().rstrip("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def test_architecture_checks_find_modules_in_package_and_in_plugins() -> None:
    assert len(MODULES) > 40
    assert PLUGIN_MODULES


@pytest.mark.parametrize("path", [*MODULES, *PLUGIN_MODULES], ids=lambda path: path.name)
def test_module_and_class_names_have_no_vague_words(path: Path) -> None:
    banned = {word.rstrip("s") for word in BANNED}
    classes = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    for name in [path.stem, *classes]:
        assert not words_in_name(name) & banned, name


def test_no_two_modules_share_a_name() -> None:
    names = Counter(path.stem for path in MODULES if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_classes_of_package_share_a_name() -> None:
    names = Counter(
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", MODULES, ids=relative_path)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_hook_specifications_equal_the_documented_hooks() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("workpool_")]
    assert sorted(hooks) == [
        "workpool_admission",
        "workpool_event",
        "workpool_lifespan",
        "workpool_session_handler",
        "workpool_wrap_session",
    ]


def catches_every_exception(handler: ast.ExceptHandler) -> bool:
    caught = ast.unparse(handler.type) if handler.type else "BaseException"
    reraises = any(isinstance(node, ast.Raise) and node.exc is None for node in handler.body)
    return bool(re.search(r"\b(Base)?Exception\b", caught)) and not reraises


def test_broad_excepts_occur_only_in_listed_modules() -> None:
    found = {
        relative_path(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and catches_every_exception(node)
    }
    assert found == MODULES_WITH_BROAD_EXCEPT


def comments_by_line(path: Path) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def find_suppression_comments(path: Path) -> list[str]:
    return [
        text for text in comments_by_line(path) if re.search(r"noqa|type: ignore|pragma:", text)
    ]


def test_lint_suppressions_in_package_are_few_and_have_reasons() -> None:
    paths = [*MODULES, *PLUGIN_MODULES]
    found = [(path, text) for path in paths for text in find_suppression_comments(path)]
    for path, text in found:
        assert re.search(
            r"(noqa: [A-Z]+[0-9]+|type: ignore\[[a-z-]+\]|pragma: no cover).* - .+", text
        ), (path, text)
    lines = sum(len(path.read_text().splitlines()) for path in paths)
    assert len(found) <= lines * SUPPRESSIONS_PER_1000_LINES / 1000


def test_lint_suppressions_in_tests_have_reasons() -> None:
    """A reason follows `noqa` after a dash, and follows `type: ignore` after a second `#`."""
    paths = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("plugins/*/tests/**/*.py")]
    found = [(path, text) for path in paths for text in find_suppression_comments(path)]
    assert len(found) > 50
    for path, text in found:
        assert re.search(r"noqa: [A-Z0-9, ]+ - .+|type: ignore\[[a-z-]+\] +# .+", text), (
            path,
            text,
        )


@pytest.mark.parametrize("name", LOOPS)
def test_module_that_runs_a_pool_loop_suppresses_no_coverage_or_complexity_rule(
    name: str,
) -> None:
    hidden = [
        text
        for text in find_suppression_comments(PACKAGE / name)
        if re.search("pragma|C901|PLR", text)
    ]
    assert hidden == []


def find_imported_names(tree: ast.AST) -> list[tuple[str, str]]:
    """Return the full name and the local name of each object that the module imports."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [(each.name, each.asname or "") for each in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found += [(f"{module}.{each.name}", each.asname or each.name) for each in names]
            case ast.Call(args=[ast.Constant(value=str(module)), *_]) if re.search(
                r"\b(import_module|__import__)$", ast.unparse(node.func)
            ):
                found.append((module, ""))
    return found


def module_name(path: Path) -> str:
    """Return the dotted name of a file: `workpool.pool.lease`, `workpool_echo`."""
    root = ROOT if PACKAGE in path.parents else path.parents[len(path.parts) - len(ROOT.parts) - 3]
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def test_imports_between_modules_form_no_cycle() -> None:
    modules = {module_name(path): path for path in [*MODULES, *PLUGIN_MODULES]}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        for dotted, _ in find_imported_names(ast.parse(path.read_text())):
            found = dotted if dotted in modules else dotted.rpartition(".")[0]
            if found in modules and found != name:
                graph.setdefault(name, set()).add(found)
    assert len(graph) > 100
    TopologicalSorter(graph).prepare()  # `prepare` raises CycleError if there is a cycle


def find_private_component(dotted: str) -> str | None:
    """Return the first private component of a dotted name; None if all components are public."""
    module = max((each for each in PUBLIC if f"{dotted}.".startswith(f"{each}.")), key=len)
    name = dotted[len(module) :].lstrip(".").partition(".")[0]
    known = name in workpool.__all__ if module == "workpool" else not name.startswith("_")
    return None if not name or (known and name != "*") else f"{module}.{name}"


def find_private_names_used(source: str) -> set[str]:
    """Return all private names of workpool that a plugin's code uses.

    Imports and attributes count.
    """
    tree = ast.parse(source)
    meanings = {"workpool": "workpool"} | {
        alias: whole for whole, alias in find_imported_names(tree)
    }
    used = {whole for whole, _ in find_imported_names(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            used.add(f"{meanings.get(root, '')}.{rest}")
    ours = [each for each in used if each.partition(".")[0] == "workpool"]
    return {part for each in ours if (part := find_private_component(each))}


@pytest.mark.parametrize("path", PLUGIN_MODULES, ids=lambda path: path.name)
def test_plugins_use_only_the_public_api(path: Path) -> None:
    assert find_private_names_used(path.read_text()) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from workpool import Session, handler", []),
        ("from workpool.events import SessionFinished", []),
        ("import workpool.errors as e\ne.LeaseLost", []),
        ("from workpool import settings", []),
        ("import workpool\nworkpool.events.Event; workpool.Session", []),
        ("from workpool_echo.parts import _inner", []),
        ("from workpool import __file__", ["workpool.__file__"]),
        ("from workpool import *", ["workpool.*"]),
        ("from workpool import pool", ["workpool.pool"]),
        ("from workpool.events import _x", ["workpool.events._x"]),
        ("from workpool.pool.lease import Lease", ["workpool.pool"]),
        ("import workpool.wire.client", ["workpool.wire"]),
        ("def f():\n    import workpool.pool as p", ["workpool.pool"]),
        (
            "if TYPE_CHECKING:\n    from workpool.session import SessionBackend",
            ["workpool.session"],
        ),
        ("import workpool as w\nw.pool.lease.Lease", ["workpool.pool"]),
        ("from workpool import events as e\ne._x", ["workpool.events._x"]),
        ("import importlib\nimportlib.import_module('workpool.wire')", ["workpool.wire"]),
        ("from workpool.testing import Kit", ["workpool.testing"]),
        ("from workpool.server import ControlPlane", ["workpool.server"]),
    ],
)
def test_private_import_in_code_of_plugin_is_found(source: str, found: list[str]) -> None:
    assert find_private_names_used(source) == set(found)


def is_expression_of_dialect_name(node: ast.AST) -> bool:
    """Return whether an expression names a dialect: `QODER`, `protocol.QODER`, `"qoder"`."""
    return ast.unparse(node).rpartition(".")[2].strip("'").lower() in get_args(Dialect)


@pytest.mark.parametrize("path", [*MODULES, *PLUGIN_MODULES], ids=lambda path: path.name)
def test_no_module_compares_a_value_with_a_dialect_name(path: Path) -> None:
    compared = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        and any(map(is_expression_of_dialect_name, [node.left, *node.comparators]))
    ]
    assert compared == []


def test_no_file_contains_a_path_of_the_development_machine() -> None:
    pattern = re.compile(r"/work/(main|shared)|/root/|pypi\.org|pythonhosted|npmjs|debian\.org")
    suffixes = {".py", ".md", ".toml", ".yml", ".sql", ".txt"}
    named = [
        path.relative_to(ROOT).as_posix()
        for folder in ("workpool", "plugins", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and path != Path(__file__) and pattern.search(path.read_text())
    ]
    assert named == []


DIALECT_TABLES = {
    "wire/protocol.py",
    "wire/client_dialects.py",
    "server/http/server_dialects.py",
}
DIALECT_TEXTS = {
    "cli/conform.py",  # The help of this command shows an example with `--dialect anthropic`.
    # These three modules contain the conformance clauses that differ between the dialects.
    "conformance/clauses/heartbeats.py",
    "conformance/clauses/stops.py",
    "conformance/clauses/conversations.py",
}


@pytest.mark.parametrize("path", [*MODULES, *PLUGIN_MODULES], ids=lambda path: path.name)
def test_strings_with_dialect_names_occur_only_in_listed_modules(path: Path) -> None:
    if path.is_relative_to(PACKAGE) and relative_path(path) in DIALECT_TABLES | DIALECT_TEXTS:
        return
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    names = re.compile(rf"\b({'|'.join(get_args(Dialect))})\b", re.IGNORECASE)
    found = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in docstrings
        if isinstance(node.value, str) and names.search(node.value)
    ]
    assert found == []
