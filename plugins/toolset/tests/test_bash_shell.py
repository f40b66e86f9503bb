"""Tests of `BashShell`, the persistent bash of a session, with and without a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from workpool_toolset.command_sandbox import BASH, Bubblewrap, NoIsolation, ProcessLimits
from workpool_toolset.shell import BashShell, ShellEndedError

WAIT_SECONDS = 50.0
"""The time limit of a wait, which a loaded machine does not exceed."""


def open_pidfds(word: str) -> list[int]:
    """Return pidfds of all processes that have this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(os.pidfd_open(int(path.parent.name)))
    return found


async def wait_for_process_end(*processes: int) -> None:
    """Wait until the processes of these pidfds have ended, and close the pidfds."""
    loop = asyncio.get_running_loop()
    for process in processes:
        over = asyncio.Event()
        # A pidfd becomes readable when its process ends.
        loop.add_reader(process, over.set)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await over.wait()
        finally:
            loop.remove_reader(process)
            os.close(process)


async def test_shell_keeps_variables_functions_and_directory_between_calls(agent: Any) -> None:
    await agent.expect_tool_success(
        "Bash", command="mkdir sub && cd sub; export A=1; f() { echo f $A; }"
    )
    assert await agent.expect_tool_success("bash", command="f; pwd") == f"f 1\n{agent.shown}/sub\n"


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("echo out; echo err >&2", "out\nerr\n"),
        ("printf 'no newline'", "no newline"),
        ("true", "(no output)"),
        ("cat", "(no output)"),
        ("printf '\\e[1;31mred\\e[0m \\e]0;title\\a'", "red "),
        ("printf 'a\\xffb'", "a\ufffdb"),
        ("echo a\n\n# comment\necho b", "a\nb\n"),
        ("cat <<'X'\n'\"$(\nX", "'\"$(\n"),
        ("echo $PS1$PS2-$TERM", "-dumb\n"),
    ],
)
async def test_shell_output_is_returned_without_control_sequences(
    agent: Any, command: str, output: str
) -> None:
    assert await agent.expect_tool_success("bash", command=command) == output


async def test_output_of_shell_that_echoes_its_input_is_complete(agent: Any) -> None:
    shown_output = await agent.expect_tool_success("bash", command="set -vx; echo 1")
    assert "\n1\n" in shown_output
    assert "2\n" in await agent.expect_tool_success("bash", command="set +vx; echo 2")


async def test_failed_command_returns_its_output_and_exit_status(agent: Any) -> None:
    assert await agent.expect_tool_error(
        "bash", command="echo x; exit_code() { return 3; }; exit_code"
    ) == ("x\n\nexit status 3")
    assert "syntax error" in await agent.expect_tool_error("bash", command="if; then")
    assert "unexpected EOF" in await agent.expect_tool_error("bash", command="echo 'open")
    assert await agent.expect_tool_success("bash", command="echo still here") == "still here\n"


async def test_long_shell_output_is_cut_at_its_beginning(agent: Any) -> None:
    shown_output = await agent.expect_tool_success("bash", command="seq 1 200000")
    assert shown_output.startswith("[output truncated]\n")
    assert shown_output.endswith("\n199999\n200000\n")
    assert 102_400 <= len(shown_output) <= 102_400 + 19


async def test_command_beyond_timeout_is_killed_with_its_shell(agent: Any) -> None:
    failed = await agent.expect_tool_error("bash", command="sleep 600", timeout_ms=300)
    assert failed.startswith("killed after 0.3 s")
    assert "restart=true" in failed
    assert "restart=true" in await agent.expect_tool_error("bash", command="echo x")
    assert await agent.expect_tool_success("bash", restart=True) == "bash session restarted"
    assert await agent.expect_tool_success("bash", command="echo x") == "x\n"


async def test_output_of_running_command_is_available_before_its_end(
    workspace_directory: Path,
) -> None:
    shell = BashShell(BASH, {"PATH": os.environ["PATH"]}, workspace_directory)
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
        running = group.create_task(shell.run_command("echo before; sleep 600"))
        while shell.output_so_far != "before\n":  # noqa: ASYNC110 - the shell reports no event
            await asyncio.sleep(0.01)
        running.cancel()


async def test_error_of_command_that_exits_shell_names_status_and_restart_option(
    agent: Any,
) -> None:
    failed = await agent.expect_tool_error("bash", command="echo bye; exit 7")
    assert failed == "bye\n\nthe shell ended with status 7; use restart=true for a new one"
    assert await agent.expect_tool_success("bash", command="echo new", restart=True) == "new\n"


async def test_exit_of_shell_does_not_wait_for_background_job(agent: Any) -> None:
    failed = await agent.expect_tool_error("bash", command="sleep 60.253 & echo bye; exit 7")
    assert failed == "bye\n\nthe shell ended with status 7; use restart=true for a new one"
    await wait_for_process_end(*open_pidfds("60.253"))


async def test_exit_of_shell_does_not_wait_for_background_job_that_prints_endlessly(
    agent_without_sandbox: Any,
) -> None:
    # During the sleep, the job begins to print.
    failed = await agent_without_sandbox.expect_tool_error(
        "bash", command="yes & sleep 0.1; exit 7"
    )
    assert failed.endswith("the shell ended with status 7; use restart=true for a new one")


async def test_shell_output_before_exit_is_returned_completely(agent: Any) -> None:
    failed = await agent.expect_tool_error("bash", command="seq 1 15000; sleep 60 & exit 7")
    assert failed.startswith("1\n2\n")
    assert "\n15000\n\nthe shell ended with status 7" in failed


@pytest.mark.parametrize("redirection", ["1>/dev/null", ">&-", "&>/dev/null", ">log 199>&-"])
async def test_redirection_of_shell_output_does_not_affect_later_commands(
    agent: Any, redirection: str
) -> None:
    assert await agent.expect_tool_success("bash", command=f"exec {redirection}") == "(no output)"
    assert await agent.expect_tool_error("bash", command="(exit 3)") == "exit status 3"
    assert await agent.expect_tool_success("bash", command="echo later >&2") == "later\n"


async def test_command_inherits_only_standard_streams(agent: Any) -> None:
    shown_output = await agent.expect_tool_success("bash", command="ls -1 /proc/self/fd")
    # Accept descriptor 3, which is not inherited: `ls` has opened it to list the directory.
    assert shown_output == "0\n1\n2\n3\n"


PROCESS_WORD = f"test-of-{os.getpid()}"
"""A word in the command lines of test processes, different in each process that runs tests."""


def two_process_command(program: str) -> str:
    """Return a command that starts two background processes and ends when both run.

    The processes use builtins only: a shell that forks shows its command line twice for a moment.
    """
    start = f'for n in 1 2; do {program} -c ": >up$n; : <stay" {PROCESS_WORD} & done'
    wait = "until [ -e up1 -a -e up2 ]; do sleep 0.02; done"
    # Keep an existing FIFO: a process of an earlier command may be about to open it.
    return f"rm -f up*; [ -p stay ] || mkfifo stay; {start}; {wait}"


async def test_closed_shell_leaves_no_process_of_its_group(agent_without_sandbox: Any) -> None:
    start_two = two_process_command("sh")
    await agent_without_sandbox.expect_tool_success(
        "bash", command=f"trap '' TERM; {start_two}; trap - TERM; {start_two}"
    )
    processes = open_pidfds(PROCESS_WORD)
    assert len(processes) == 4
    await agent_without_sandbox.toolbox.close_shell()
    await wait_for_process_end(*processes)


async def test_close_of_sandboxed_shell_ends_processes_in_every_process_group(
    agent_with_sandbox: Any,
) -> None:
    await agent_with_sandbox.expect_tool_success("bash", command=two_process_command("setsid sh"))
    processes = open_pidfds(PROCESS_WORD)
    assert len(processes) == 2
    await agent_with_sandbox.toolbox.close_shell()
    await wait_for_process_end(*processes)


async def test_cancelled_command_kills_its_shell(agent: Any, workspace_directory: Path) -> None:
    os.mkfifo(workspace_directory / "ready")
    (workspace_directory / "ready").chmod(0o666)
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
        command = "trap '' TERM; echo > ready; sleep 60.127"
        calling = group.create_task(agent.call_tool("bash", command=command))
        await asyncio.to_thread((workspace_directory / "ready").read_text)
        calling.cancel()
    await wait_for_process_end(*open_pidfds("60.127"))
    assert "restart" in await agent.expect_tool_error("bash", command="echo x")


async def test_shell_close_that_is_cancelled_leaves_no_process(
    workspace_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = asyncio.subprocess.Process.wait

    async def wait_and_cancel_shell_close(process: asyncio.subprocess.Process) -> int:
        status = await wait(process)
        closing.cancel()
        await asyncio.sleep(0)
        return status

    shell = BashShell(BASH, {"PATH": os.environ["PATH"]}, workspace_directory)
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
        await shell.run_command(f"trap '' TERM; {two_process_command('sh')}; trap - TERM")
        processes = open_pidfds(PROCESS_WORD)
        assert len(processes) == 2
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.subprocess.Process, "wait", wait_and_cancel_shell_close)
            closing = group.create_task(shell.close())
            await asyncio.wait({closing})
    await wait_for_process_end(*processes)
    await shell.close()


async def test_sandboxed_processes_end_when_worker_is_killed(
    sandbox: Bubblewrap, workspace_directory: Path
) -> None:
    os.chown(workspace_directory, *(sandbox.owner_of_session_files("s") or (-1, -1)))
    words = sandbox.command_line(
        "s", workspace_directory, [*BASH, "-c", "echo up; setsid sleep 61.25"]
    )
    script = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    worker = await asyncio.create_subprocess_exec(
        "python3", "-c", script, *words, stdout=asyncio.subprocess.PIPE
    )
    assert worker.stdout
    async with asyncio.timeout(WAIT_SECONDS):
        assert await worker.stdout.readline() == b"up\n"
        worker.kill()
        # The pipe ends only when all processes of the sandbox have ended.
        assert await worker.stdout.read() == b""
        await worker.wait()


@pytest.mark.parametrize("isolation", [NoIsolation(), Bubblewrap(ProcessLimits())])
def test_shell_environment_contains_only_allowed_variables(
    isolation: NoIsolation | Bubblewrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("QODER_PAT", "ANTHROPIC_ENVIRONMENT_KEY", "WORKPOOL_TOKEN", "AWS_SECRET", "LANG"):
        monkeypatch.setenv(name, "C.UTF-8")
    allowed = {"PATH", "HOME", "LANG", "TZ", "TMPDIR", "PS1", "PS2", "TERM"}
    assert isolation.command_environment_variables(None).keys() <= allowed
    assert isolation.command_environment_variables(None)["LANG"] == "C.UTF-8"
    only = isolation.command_environment_variables({"A": "1"})
    assert only == {"A": "1", "PS1": "", "PS2": "", "TERM": "dumb"}


async def test_sandbox_enforces_limits_of_memory_files_and_processes(
    agent_with_sandbox: Any,
) -> None:
    memory = "python3 -c 'bytearray(3 << 30)'"
    assert "MemoryError" in await agent_with_sandbox.expect_tool_error("bash", command=memory)
    assert "File size limit" in await agent_with_sandbox.expect_tool_error(
        "bash", command="head -c 80M /dev/zero > f"
    )
    many = "import os, time\nfor n in range(99): os.fork() or time.sleep(60)"
    shown_output = await agent_with_sandbox.expect_tool_error(
        "bash", command=f"python3 -c '{many}'"
    )
    assert "Resource temporarily unavailable" in shown_output
    await agent_with_sandbox.expect_tool_success("bash", restart=True)
    shown_output = await agent_with_sandbox.expect_tool_success(
        "bash", command="ulimit -H -t -u -d -f -c"
    )
    assert re.findall(r"\d+$", shown_output, re.MULTILINE) == ["20", "64", "1048576", "65536", "0"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_sandbox_of_worker_without_root_hides_host_files(
    sandbox: Bubblewrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Use the system's Python. User 65534 may have no access to the virtual environment.
    monkeypatch.setattr(sys, "executable", shutil.which("python3", path=os.defpath))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.chown(folder, 65534, 65534)
        other = Bubblewrap(sandbox.limits, as_root=False)
        script = (
            "touch made; id -u; df -m --output=size /tmp /dev/shm | tail -n 2;"
            " cat /etc/shadow; unshare -U id"
        )
        done = subprocess.run(  # noqa: S603 - no input from outside
            other.command_line("s", folder, [*BASH, "-c", script]),
            env=other.command_environment_variables(None),
            capture_output=True,
            text=True,
            check=False,
            user=65534,
            group=65534,
            extra_groups=[],
        )
        if "setting up uid map" in done.stderr or "No permissions" in done.stderr:
            pytest.skip(f"this machine forbids user namespaces without root: {done.stderr.strip()}")
        user, *sizes = map(int, done.stdout.split())
        assert user == 65534, done.stderr
        assert sum(sizes) == sandbox.limits.memory_mb
        assert (folder / "made").exists()
        assert "unshare failed" in done.stderr


def test_sandbox_started_by_root_user_gives_each_session_its_own_user() -> None:
    isolation = Bubblewrap(ProcessLimits(), as_root=True)
    users = {isolation.owner_of_session_files(f"sess_{number}") for number in range(200)}
    assert len(users) == 200
    assert all(user and 1_900_000_000 <= user[0] < 2_100_000_000 for user in users)
    assert Bubblewrap(ProcessLimits(), as_root=False).owner_of_session_files("sess_1") is None


async def test_command_is_not_sent_to_shell_that_never_answers(tmp_path: Path) -> None:
    """The fake shell records its input and never answers. `BashShell` must send it no command."""
    words = ["/bin/bash", "-c", "head -n 3 > input; exit 3"]
    shell = BashShell(words, {"PATH": "/usr/bin:/bin"}, tmp_path)
    with pytest.raises(ShellEndedError):
        await shell.run_command("touch made")
    assert (
        (tmp_path / "input")
        .read_text()
        .startswith("exec 199>&1\neval : </dev/null 2>&199 199>&-\n")
    )
