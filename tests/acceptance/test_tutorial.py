"""The steps of the tutorial page, run in a shell in a new directory and without settings.

The test changes two things: packages come from this environment instead of a package index, and the
server gets a free port.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.trial, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
INSTALLED = """
printf '#!/bin/sh\\nexec python -m pytest "$@"\\n' > .venv/bin/pytest
chmod +x .venv/bin/pytest
"""
"""The `pytest` command that pip would install, which pip does not do here."""
WAIT = "until (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.1; done\n"


def read_code_blocks() -> list[tuple[str, str]]:
    """Return the code blocks of the tutorial, each with its language."""
    page = (ROOT / "workpool/docs/tutorial.md").read_text()
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def make_shell_script(found: list[tuple[str, str]], port: int) -> str:
    """Return the commands of all steps as one shell script."""
    steps = ["set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"]
    for language, text in found:
        if language == "python":
            file = text.splitlines()[0].removeprefix("# ")
            steps.append(f"cat > {file} <<'END'\n{text}END\n")
            continue
        assert language == "console"
        step = text.replace("pip install", "pip install --no-index --no-build-isolation")
        step = step.replace("workpool serve", f"workpool serve --port {port}")
        steps.append(step.replace("8484", str(port)))
        if "pip install" in step:
            steps.append(INSTALLED)
        if "workpool serve" in step:
            steps.append(WAIT.format(port=port))
    return "".join(steps)


def copy_repository_files_for_tutorial(place: Path) -> Path:
    """Copy the files of the repository that the tutorial needs."""
    place.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "workpool", place / "workpool", ignore=ignored)
    return place


def copy_environment_without_workpool_settings() -> dict[str, str]:
    """Return the environment variables of a user who has installed workpool and set nothing."""
    foreign = ("WORKPOOL_", "QODER_PAT", "COVERAGE_", "COV_", "PYTEST_", "PIP_", "VIRTUAL_ENV")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}:{inherited['PATH']}",
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "WORKPOOL_METRICS_LISTEN": "off",
    }


def test_tutorial_steps_run_with_documented_results(tmp_path: Path, reserved_port: int) -> None:
    place = copy_repository_files_for_tutorial(tmp_path / "workpool")
    done = subprocess.run(  # noqa: S603 - the tutorial's commands
        ["/bin/bash", "-c", make_shell_script(read_code_blocks(), reserved_port)],
        cwd=place,
        env=copy_environment_without_workpool_settings(),
        capture_output=True,
        text=True,
        check=False,
    )
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, output
    assert re.findall(r"(\d+) passed", done.stdout) == ["3", "5"]
    assert "ready WORKPOOL_BASE_URL=http://127.0.0.1:" in done.stdout
    listed = [line.split("\t") for line in done.stdout.splitlines() if "\tsession\t" in line]
    assert [fields[2] for fields in listed] == ["stopped"] * 3, output
    assert all("page=5" in fields[-1] and "written=5" in fields[-1] for fields in listed), output
    assert (tmp_path / "reports" / "workpool_reports.py").exists()


def test_tutorial_page_has_code_blocks_in_expected_order() -> None:
    kinds = [language for language, _ in read_code_blocks()]
    assert kinds == ["console", "console", "python", "python", "console", "console", "console"]
