"""Tests of hostile sessions, which try to read the worker's token or to change foreign files.

The token is where a real worker has it: in this process's environment, in a file beside the
workspaces and in another session's workspace. No result of a tool may contain it, and no file
outside the session's workspace may change.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from workpool_toolset.tool_result import ToolResult

TOKEN = "pat-Zx9-of-the-worker"  # noqa: S105 - a token of the test only


@pytest.fixture(autouse=True)
def files_outside_workspace(
    workspace_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Create files outside the workspace. Check after the test that they are unchanged."""
    monkeypatch.setenv("QODER_PAT", TOKEN)
    monkeypatch.setenv("ANTHROPIC_ENVIRONMENT_KEY", TOKEN)
    outside = workspace_directory.parent
    (outside / "token").write_text(TOKEN)
    other = outside / "workspace-2"
    (other / "deep").mkdir(parents=True)
    (other / "secret.txt").write_text(TOKEN)
    (other / "deep/secret.txt").write_text(TOKEN)
    before = hash_files_outside_workspace(outside)
    yield outside
    assert hash_files_outside_workspace(outside) == before


def hash_files_outside_workspace(outside: Path) -> dict[str, str]:
    """Return a hash of the content of each file outside the workspace, by path."""
    return {
        str(path.relative_to(outside)): hashlib.sha256(
            path.read_bytes() if path.is_file() else b""
        ).hexdigest()
        for part in sorted(outside.iterdir())
        for path in (part, *sorted(part.rglob("*") if part.name != "workspace" else ()))
    }


def join_result_text(result: ToolResult) -> str:
    return str(result.content)


def create_links_out_of_workspace(folder: Path) -> None:
    """Create symbolic links in the workspace, most of which lead outside, as a session could."""
    outside = folder.parent
    (folder / "src").mkdir()
    (folder / "src/own.txt").write_text("own")
    links: dict[str, str | Path] = {
        "absolute": outside / "token",
        "relative": "../token",
        "folder": outside / "workspace-2",
        "up": "..",
        "top": "/",
        "chain": "chain2",
        "chain2": "src/../chain3",
        "chain3": "../token",
        "loop": "loop2",
        "loop2": "loop",
        "self": "self",
        "dangling": "../not-there",
        "environ": "/proc/self/environ",
        "parent": f"/proc/{os.getpid()}/environ",
        "cwd": "/proc/self/cwd",
        "descriptor": "/proc/self/fd",
        "image.png": "../token",
        "paper.pdf": outside / "token",
        "src/inner": "../../token",
        "src/absolute": str(folder / "absolute"),
        "shown": "/workspace/../token",
        "long": "src/" + "../src/" * 500 + "../../token",
        "device": "/dev/zero",
        "root": "/proc/self/root",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    for number in range(60):
        (folder / f"hop{number}").symlink_to(f"hop{number + 1}")
    (folder / "hop60").symlink_to("../token")
    os.mkfifo(folder / "pipe")


def hostile_paths(folder: Path) -> list[str]:
    outside, pid = folder.parent, os.getpid()
    return [
        f"{outside}/token",
        f"{outside}/workspace-2/secret.txt",
        f"/{outside}/token",
        f"{folder}/../token",
        f"{folder}-2/secret.txt",
        *("../token", "./../token", "src/../../token", "src/../../workspace-2/secret.txt"),
        *(
            "/workspace/../token",
            "/workspace/../../token",
            "/workspace-2/secret.txt",
            "/workspacex",
        ),
        *("absolute", "relative", "chain", "shown", "long", "hop0", "hop20", "src/inner"),
        *("src/absolute", "folder/secret.txt", "folder/deep/secret.txt", "up/token", "up/up/up"),
        *(
            "up/workspace-2/secret.txt",
            f"top{outside}/token",
            "loop",
            "loop/token",
            "self",
            "self/x",
        ),
        *("dangling", "environ", "parent", "cwd/../token", "descriptor/0", f"root{outside}/token"),
        *("image.png", "paper.pdf", "device", "pipe", "pipe/x", "src/own.txt/../../../token"),
        *("/proc/self/environ", f"/proc/{pid}/environ", "/proc/1/environ", "/proc/self/mem"),
        *(f"/proc/self/root{outside}/token", f"/proc/{pid}/cwd/token", "/proc/self/fd/0"),
        *("/etc/passwd", "/etc/shadow", "/dev/stdin", "/dev/zero", "/dev/fd/0", "/", "//", "///"),
        *(
            "..",
            "../",
            "../..",
            "....//....//token",
            "..\\token",
            "%2e%2e/token",
            "\uff0e\uff0e/token",
        ),
        *("~/token", "~root", "$HOME/token", "file:///etc/passwd", "", " ", "\0", "../token\0.txt"),
        *("\ud800", "\udcff/../../token", "a" * 300, "a/" * 3000, "../" * 3000 + "etc/passwd"),
        *("src\n/../../token", "-rf", "--files", "*", "{..,}/token", ".git/../../token"),
    ]


INPUTS: dict[str, list[dict[str, Any]]] = {
    "read": [{}, {"view_range": [1, 5]}],
    "write": [{"content": "changed"}],
    "edit": [{"old_string": "pat", "new_string": "changed"}],
    "glob": [{"pattern": "**"}],
    "grep": [{"pattern": "pat|Zx9"}],
}
FIELD = {"glob": "path", "grep": "path"}


@pytest.mark.parametrize("tool", INPUTS)
async def test_hostile_path_with_sandbox_reaches_no_file_outside_workspace(
    agent_with_sandbox: Any, workspace_directory: Path, tool: str
) -> None:
    await assert_hostile_paths_reveal_nothing(agent_with_sandbox, workspace_directory, tool)


@pytest.mark.parametrize("tool", INPUTS)
async def test_hostile_path_without_sandbox_reaches_no_file_outside_workspace(
    agent_without_sandbox: Any, workspace_directory: Path, tool: str
) -> None:
    await assert_hostile_paths_reveal_nothing(agent_without_sandbox, workspace_directory, tool)


async def assert_hostile_paths_reveal_nothing(agent: Any, folder: Path, tool: str) -> None:
    create_links_out_of_workspace(folder)
    for path in hostile_paths(folder):
        for fields in INPUTS[tool]:
            result = await agent.call_tool(tool, **{FIELD.get(tool, "file_path"): path}, **fields)
            answer = join_result_text(result)
            assert TOKEN not in answer, path
            assert "secret.txt" not in answer or "secret.txt" in path, path
            assert str(folder.parent) not in answer.replace(path, ""), path


PATTERNS = [
    *("/**", "/etc/*", "../*", "../**", "**/../../*", "src/../../*", "..", "{../,}*", "[.][.]/*"),
    *("*/token", "up/*", "top/**", "folder/*", "**/secret.txt", "*/*/secret.txt", "loop/**"),
    *("\0", "\ud800", "", "**/" * 400, "[", "[!", "*" * 300, "a" * 5000, "cwd/**", "root/etc/*"),
]


async def test_hostile_glob_pattern_finds_no_file_outside_workspace(
    agent_with_sandbox: Any, workspace_directory: Path
) -> None:
    create_links_out_of_workspace(workspace_directory)
    for pattern in PATTERNS:
        answer = join_result_text(await agent_with_sandbox.call_tool("glob", pattern=pattern))
        assert "secret.txt" not in answer or "secret.txt" in pattern, pattern
        assert "token" not in answer or "token" in pattern, pattern


GREPS = [
    *("--files", "-f../token", "--pre=cat", "-z", "--follow", "(a+)+$", "(?", "[", "\\", "\0", ""),
    *("\ud800", "(" * 500, "a{1,1000}{1,1000}", "--hostname-bin=/bin/sh", "-e pat", "pat"),
]


async def test_hostile_grep_pattern_is_not_taken_for_an_option(
    agent_with_sandbox: Any, workspace_directory: Path
) -> None:
    create_links_out_of_workspace(workspace_directory)
    for pattern in GREPS:
        assert TOKEN not in join_result_text(
            await agent_with_sandbox.call_tool("grep", pattern=pattern)
        ), pattern
        include = await agent_with_sandbox.call_tool("grep", pattern="pat", include=pattern)
        assert TOKEN not in join_result_text(include), pattern


def hostile_shell_commands(outside: Path, port: int) -> list[str]:
    pid = os.getpid()
    python = "python3 -c"
    return [
        *("env", "export -p", "set", "cat /proc/*/environ", "cat /proc/1/environ | tr '\\0' '\\n'"),
        *(f"cat /proc/{pid}/environ", f"cat /proc/{pid}/cmdline", "cat /proc/$PPID/environ"),
        *(f"cat {outside}/token", f"ls {outside}", f"cat {outside}/workspace-2/secret.txt"),
        *("ls ..", "cat ../token", f"cat /proc/1/root{outside}/token", f"cat /proc/1/cwd{outside}"),
        f"for f in /proc/*/root /proc/*/cwd; do cat $f{outside}/token; done",
        *("for f in /proc/*/fd/*; do timeout 1 cat $f; done", "cat /proc/*/mem | head -c 100"),
        *("find / -xdev -name token -exec cat {} +", "grep -rs Zx9 /etc /dev /tmp /workspace"),
        *("ls -la /root /home /var /srv /mnt /opt /run /sys", "cat /etc/shadow", "cat ~root/.*"),
        *("ps axeww", "pgrep -a python", "kill -9 -1", f"kill -9 {pid}", "kill -STOP 1"),
        *(
            "touch /usr/x",
            "touch /etc/x",
            "touch /x",
            "mkdir /y",
            "rm -rf /usr/bin/env",
            "touch /dev/x",
        ),
        *("chmod u+w /usr", "mount -o remount,rw /", "mount -o remount,rw /usr", "umount /usr"),
        *("mount -t proc proc /tmp", f"mount --bind / /tmp && cat /tmp{outside}/token"),
        *("mknod /tmp/disk b 254 0 && head -c 1000 /tmp/disk", "ls /dev", "cat /dev/mem /dev/kmsg"),
        *(
            "mknod disk b 8 0 && head -c 1000 disk",
            "debugfs -R 'ls /' /dev/vda",
            "head -c 1 /dev/vda",
        ),
        f"unshare -Urm sh -c 'mount --bind / /tmp; cat /tmp{outside}/token'",
        f"unshare -Urmp --fork sh -c 'mount -t proc proc /proc; cat /proc/{pid}/environ'",
        *(f"nsenter -t 1 -a cat {outside}/token", f"nsenter -t {pid} -m cat {outside}/token"),
        f"chroot /proc/1/root cat {outside}/token",
        f"bwrap --bind / / cat {outside}/token",
        *("setpriv --reuid 0 id -u", "su -c id", "sudo -n id", "newgrp root", "passwd root"),
        *("echo '|/bin/sh' > /proc/sys/kernel/core_pattern", "echo b > /proc/sysrq-trigger"),
        *("sysctl -w kernel.hostname=x", "hostname owned", "date -s 2001-01-01", "dmesg"),
        *("echo 0 > /proc/self/oom_score_adj", "ulimit -u unlimited", "ulimit -d unlimited"),
        *("echo 1 > /proc/sys/vm/drop_caches", "insmod /tmp/x.ko", "keyctl show", "capsh --print"),
        f"exec 3<>/dev/tcp/127.0.0.1/{port}; echo GET >&3",
        f"{python} 'import socket; socket.create_connection((\"127.0.0.1\", {port}), 2)'",
        f"{python} 'import socket; socket.create_connection((\"1.1.1.1\", 53), 2)'",
        f"{python} 'import socket; socket.socket(socket.AF_PACKET, 3, 768)'",
        f"{python} 'import ctypes; print(ctypes.CDLL(None).ptrace(16, {pid}, 0, 0))'",
        f"{python} 'import os; os.setuid(0); print(open(\"{outside}/token\").read())'",
        f'{python} \'import os; fd = os.open("/", 0); os.chroot("/tmp"); os.fchdir(fd)\'',
        *("ln -s / top; cat top/etc/shadow", f"ln {outside}/token hard", "ln /usr/bin/su hard; ls"),
        *("cat /proc/mounts | grep -c token", "cat /proc/self/mountinfo | grep Zx9"),
        *("exit", "kill -9 $$", "exec true", "exec <&-", "exec >&-; echo x", "set -e; false"),
        *(
            "builtin() { :; }; printf() { :; }; echo x",
            "trap 'echo x' DEBUG EXIT",
            "alias eval=true",
        ),
        *("cat /proc/$$/fd/0 & sleep 0.1; kill %1", "head -c 20 /proc/$$/fd/0"),
        *(
            "echo \"'",
            "cat <<X",
            "(((",
            "if",
            "$(",
            "\\",
            "'; cat ../token; '",
            "\ud800",
            "\x1b[2J",
        ),
    ]


async def test_hostile_command_reaches_nothing_outside_sandbox(
    agent_with_sandbox: Any, files_outside_workspace: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        for command in hostile_shell_commands(files_outside_workspace, listener.getsockname()[1]):
            if agent_with_sandbox.toolbox._shell.ended:
                await agent_with_sandbox.expect_tool_success("bash", restart=True)
            result = await agent_with_sandbox.call_tool("bash", command=command, timeout_ms=800)
            assert TOKEN not in join_result_text(result), command
            # No line of /etc/passwd or /etc/shadow may be in the result.
            assert not re.search("root:[x*!$]", join_result_text(result)), command
        with pytest.raises(BlockingIOError):
            listener.accept()
    os.kill(os.getpid(), 0)


def test_hostile_session_tests_contain_at_least_six_hundred_inputs(
    workspace_directory: Path,
) -> None:
    files = len(hostile_paths(workspace_directory)) * sum(map(len, INPUTS.values()))
    assert (
        files + len(PATTERNS) + 2 * len(GREPS) + len(hostile_shell_commands(workspace_directory, 1))
        >= 600
    )


REPLACER_PROGRAM = """
import ctypes, os, sys
folder, outside = sys.argv[1:]
os.chdir(folder)
os.symlink(outside, "place2")
os.symlink(outside + "/secret.txt", "leaf2")
libc, here, exchange = ctypes.CDLL(None), -100, 2
print("ready", flush=True)
while True:
    assert libc.renameat2(here, b"place", here, b"place2", exchange) == 0
    assert libc.renameat2(here, b"leaf", here, b"leaf2", exchange) == 0
"""


@pytest.fixture
def process_that_swaps_files_with_links(workspace_directory: Path) -> Iterator[None]:
    """Run a process that swaps a directory and a file of the workspace with links, over and over.

    The links lead out of the workspace.
    """
    (workspace_directory / "place").mkdir()
    (workspace_directory / "place/secret.txt").write_text("own")
    (workspace_directory / "leaf").write_text("own")
    words = [
        sys.executable,
        "-c",
        REPLACER_PROGRAM,
        str(workspace_directory),
        str(workspace_directory.parent / "workspace-2"),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:  # noqa: S603 - no input from outside
        assert process.stdout
        assert process.stdout.readline()
        yield
        assert process.poll() is None
        process.kill()


@pytest.mark.usefixtures("process_that_swaps_files_with_links")
async def test_file_tools_stay_in_workspace_while_files_become_links(
    agent_without_sandbox: Any,
) -> None:
    outcomes: set[tuple[str, bool]] = set()
    # Repeat until each tool has both succeeded and failed: the tool has then found files in some
    # calls and links in others.
    every_outcome = {(tool, error) for tool in ("read", "write", "edit") for error in (False, True)}
    rounds = 0
    while rounds < 300 or outcomes != every_outcome:
        rounds += 1
        for tool, fields in [
            ("read", {"file_path": "place/secret.txt"}),
            ("read", {"file_path": "leaf"}),
            ("write", {"file_path": "place/new.txt", "content": "changed"}),
            ("write", {"file_path": "place/made/new.txt", "content": "changed"}),
            ("edit", {"file_path": "place/secret.txt", "old_string": "own", "new_string": "own2"}),
            ("edit", {"file_path": "place/secret.txt", "old_string": "own2", "new_string": "own"}),
        ]:
            result = await agent_without_sandbox.call_tool(tool, **fields)
            assert TOKEN not in join_result_text(result)
            outcomes.add((tool, result.is_error))


@pytest.mark.usefixtures("process_that_swaps_files_with_links")
async def test_searches_stay_in_workspace_while_files_become_links(
    agent_without_sandbox: Any,
) -> None:
    for _ in range(8):
        assert TOKEN not in join_result_text(
            await agent_without_sandbox.call_tool("grep", pattern="Zx9|own")
        )
        assert TOKEN not in join_result_text(
            await agent_without_sandbox.call_tool("grep", pattern="Zx9|own", path="place")
        )
        assert "deep" not in join_result_text(
            await agent_without_sandbox.call_tool("glob", pattern="**")
        )
        assert "deep" not in join_result_text(
            await agent_without_sandbox.call_tool("glob", pattern="**", path="place")
        )
