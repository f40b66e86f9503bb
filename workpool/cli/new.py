"""`workpool new NAME`: write the project of a new plugin, with tests that pass."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Final

import typer

from workpool.cli.help_text import format_examples_section
from workpool.plugins import installed_plugins

NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
NAME_LENGTH: Final = 64
FILES: Final = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "$module.py": "module.py.in",
    "tests/test_$module.py": "test.py.in",
}
"""Files of a project whose plugin is a function, and their templates."""
CLASS_FILES: Final = FILES | {
    "README.md": "class_README.md.in",
    "$module.py": "class_module.py.in",
    "tests/test_$module.py": "class_test.py.in",
}
"""Files of a project whose plugin is a class, and their templates."""

EXAMPLES: Final = format_examples_section(
    "workpool new my-plugin", "workpool new my-database --class"
)


def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Small letters, digits, and dashes between them.")
    ],
    as_class: Annotated[
        bool,
        typer.Option("--class", help="Write a class that opens a client for the pool's lifetime."),
    ] = False,
) -> None:
    """Write a plugin project: a handler with tests that pass.

    NAME becomes a directory in the current one.
    """
    if len(name) > NAME_LENGTH or not NAME.fullmatch(name):
        raise typer.BadParameter(
            f"{name!r} cannot be a plugin's name: at most {NAME_LENGTH} small letters and digits, "
            "with single dashes between them, and a letter first"
        )
    if name in {plugin.name for plugin in installed_plugins()}:
        raise typer.BadParameter(f"a plugin named {name!r} is installed already")
    module = "workpool_" + name.replace("-", "_")
    class_name = name.title().replace("-", "") + "Plugin"
    words = {
        "name": name,
        "module": module,
        "class_name": class_name,
        "target": f"{module}:{class_name}" if as_class else module,
    }
    try:
        written = _write_project(Path(name), CLASS_FILES if as_class else FILES, words)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {error.filename}: {error.strerror}") from None
    for path in written:
        typer.echo(path)
    typer.echo(f"workpool: next: cd {name} && pytest", err=True)


def _write_project(
    directory: Path, templates_of: Mapping[str, str], words: Mapping[str, str]
) -> list[Path]:
    """Write the files of a project from their templates, and return their paths.

    Raises:
        OSError: The directory exists or cannot be written.
    """
    directory.mkdir()
    templates = files("workpool.cli") / "template"
    paths = []
    for where, source in templates_of.items():
        path = directory / Template(where).substitute(words)
        path.parent.mkdir(exist_ok=True)
        text = Template((templates / source).read_text("utf-8")).substitute(words)
        path.write_text(text, "utf-8")
        paths.append(path)
    return paths
