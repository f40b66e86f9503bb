"""The names that the source defines, against which the names in the pages are checked."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "benchmarks", "plugins", "tests", "workpool")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
FILE = re.compile(r"[\w.-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|sql|yml)")
SQL = re.compile(r"^\s*(?:CREATE|INSERT|SELECT|UPDATE) ")


class NamesInSource:
    """The names that the Python files, the SQL schema and `pyproject.toml` define.

    Attributes:
        files: The paths of all files and folders, relative to the root.
        members: The names that each class and each module defines itself, by the last part of its
            name.
        bases: The names of the base classes of each class.
        defined: All names of modules, classes, functions, arguments and attributes, and all strings
            of one word; of the tests, only modules, classes and functions.
        methods: The names of methods.
        used: The attribute paths that the code uses, such as `asyncio.to_thread`.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.members: dict[str, set[str]] = {}
        self.bases: dict[str, set[str]] = {}
        self.defined = {*dir(builtins), *keyword.kwlist}
        self.methods: set[str] = set()
        self.used: set[str] = set()
        for folder in FOLDERS:
            for path in (ROOT / folder).rglob("*"):
                self.files.add(path.relative_to(ROOT).as_posix())
                # The tests of this check contain wrong names on purpose.
                if path.suffix == ".py" and path.name != "test_citations.py":
                    self._add_module_names(path, of_tests="tests" in path.relative_to(ROOT).parts)
        self.files |= {path.name for path in ROOT.iterdir()}
        for path in [ROOT / "pyproject.toml", *(ROOT / "workpool/server").rglob("*.sql")]:
            self.defined |= set(re.findall(r"[\w-]+", path.read_text()))

    def _add_module_names(self, path: Path, *, of_tests: bool) -> None:
        name = path.parent.name if path.stem == "__init__" else path.stem
        tree = ast.parse(path.read_text())
        self.defined.add(name)
        self._add_scope_names(name, tree, tree.body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self._add_class_names(node)
            elif not of_tests:
                self._add_names_in_expression(node)

    def _add_class_names(self, node: ast.ClassDef) -> None:
        bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        self.bases.setdefault(node.name, set()).update(bases)
        self._add_scope_names(node.name, node, ast.walk(node))

    def _add_names_in_expression(self, node: ast.AST) -> None:
        match node:
            case ast.Attribute():
                self.used.add(ast.unparse(node))
            case ast.arg(arg=name):
                self.defined.add(name)
            case ast.Constant(value=str(text)) if IDENTIFIER.fullmatch(text):
                self.defined.add(text)
            case ast.Constant(value=str(text)) if SQL.search(text):
                self.defined |= set(re.findall(r"\w+", text))

    def _add_scope_names(
        self, name: str, scope: ast.Module | ast.ClassDef, nodes: Iterable[ast.AST]
    ) -> None:
        """Add the names that a module or class defines. `nodes` contain its assignments."""
        functions = {
            node.name
            for node in scope.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        others = {node.name for node in scope.body if isinstance(node, ast.ClassDef)}
        others = others.union(*map(names_defined_by, nodes))
        self.members.setdefault(name, set()).update(functions | others)
        self.defined |= others
        if isinstance(scope, ast.ClassDef):
            self.methods |= functions
        else:
            self.defined |= functions

    def is_member_defined(self, owner: str, name: str) -> bool:
        """Return whether a class or module, or a base of the class, defines `name`."""
        bases = self.bases.get(owner, set()) - {owner}
        return name in self.members.get(owner, ()) or any(
            self.is_member_defined(base, name) for base in bases
        )

    def is_file_in_repository(self, name: str) -> bool:
        """Return whether `name` is the path, or the end of the path, of a file or folder."""
        name = name.rstrip("/")
        return any(path == name or path.endswith(f"/{name}") for path in self.files)

    def is_name_in_source(self, name: str) -> bool:
        """Return whether an identifier or attribute path exists.

        A method must be named with its class: many classes have one with the same name. The part
        after the name of a class must be a member of that class; the part after another name, such
        as that of a variable, must be defined somewhere.
        """
        metric = name.removeprefix("workpool_")  # Metric definitions omit this prefix.
        if not {name, metric}.isdisjoint(self.defined | self.used):
            return True
        if self.is_file_in_repository(f"{name.replace('.', '/')}.py"):
            return True
        owner, _, member = name.rpartition(".")
        if not owner:
            return False
        owner = owner.rpartition(".")[2]
        if owner in self.bases:
            return self.is_member_defined(owner, member)
        return owner in self.defined and member in self.defined | self.methods


def names_defined_by(node: ast.AST) -> set[str]:
    """Return the names and attributes that an assignment or an import defines."""
    match node:
        case ast.Assign(targets=targets):
            return set().union(*map(find_names_in_assignment_target, targets))
        case ast.AnnAssign(target=target):
            return find_names_in_assignment_target(target)
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return {alias.asname or alias.name for alias in aliases}
    return set()


def find_names_in_assignment_target(target: ast.expr) -> set[str]:
    """Return the names and attributes that an assignment to `target` defines."""
    match target:
        case ast.Tuple(elts=parts):
            return set().union(*map(find_names_in_assignment_target, parts))
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return {name}
    return set()


def find_missing_names(text: str, names: NamesInSource) -> list[str]:
    """Return the names in backticks in `text` that are neither files nor names of the source."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = sorted(set(re.findall(r"`([^`\n]+)`", text)))
    return [
        each
        for each in quoted
        if (FILE.fullmatch(each) and not names.is_file_in_repository(each))
        or (
            not FILE.fullmatch(each)
            and IDENTIFIER.fullmatch(each.removesuffix("()"))
            and not names.is_name_in_source(each.removesuffix("()"))
        )
    ]
