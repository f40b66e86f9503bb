"""`workpool new NAME`: a plugin of your own, with tests that pass, to begin with (design §6)."""

import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Final

import typer

from workpool.plugins import available

NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
NAME_LENGTH: Final = 64
FILES: Final = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "$module.py": "module.py.in",
    "tests/test_$module.py": "test.py.in",
}
"""What is written, by the template that it is made from."""


def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Small letters, digits, dashes between.")
    ],
) -> None:
    """Write a plugin project into the new directory NAME: a handler, its tests, a README."""
    if len(name) > NAME_LENGTH or not NAME.fullmatch(name):
        raise typer.BadParameter(
            f"{name!r} cannot be a plugin's name: at most {NAME_LENGTH} small letters and digits, "
            "with single dashes between them, and a letter first"
        )
    if name in {plugin.name for plugin in available()}:
        raise typer.BadParameter(f"a plugin named {name!r} is installed already")
    words = {"name": name, "module": "workpool_" + name.replace("-", "_")}
    try:
        written = _write(Path(name), words)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {error.filename}: {error.strerror}") from None
    for path in written:
        typer.echo(path)
    typer.echo(f"workpool: next: cd {name} && pytest", err=True)


def _write(directory: Path, words: dict[str, str]) -> list[Path]:
    """Fill the templates in; raises `FileExistsError` rather than touch what is there."""
    directory.mkdir()
    templates = files("workpool.cli") / "template"
    paths = []
    for where, source in FILES.items():
        path = directory / Template(where).substitute(words)
        path.parent.mkdir(exist_ok=True)
        text = Template((templates / source).read_text("utf-8")).substitute(words)
        path.write_text(text, "utf-8")
        paths.append(path)
    return paths
