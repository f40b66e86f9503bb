"""Tests of the sandbox: its check at start, its key rings, and its in-memory directories."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from workpool_toolset import command_sandbox, sandbox_launcher
from workpool_toolset.command_sandbox import Bubblewrap, ProcessLimits, find_sandbox_problem

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.filterwarnings("ignore:unclosed resource <UVProcessTransport:ResourceWarning")
def test_sandbox_check_reports_problem_if_code_outside_plugin_reaped_sandbox_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_sandbox, "PROBE_SECONDS", 0.5)
    os.mkfifo(tmp_path / "pid")
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
    program.chmod(0o755)
    sandbox = Bubblewrap(ProcessLimits(), as_root=False, program=str(program))

    start_process = asyncio.create_subprocess_exec

    async def start_and_reap_process(*words: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start_process(*words, **options)
        kill_and_reap_process(int(await asyncio.to_thread((tmp_path / "pid").read_text)))
        return process

    async def find_problem_of_sandbox_with_reaped_process() -> str | None:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_reap_process)
        return await find_sandbox_problem(sandbox, tmp_path)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(find_problem_of_sandbox_with_reaped_process()) == "bwrap did not answer"


def kill_and_reap_process(pid: int) -> None:
    """Kill and reap a process before the event loop, which is blocked meanwhile, can reap it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def evaluate_seccomp_filter(machine: str, architecture: int, number: int) -> int:
    """Evaluate the seccomp filter for a system call, and return its decision."""
    program = list(struct.iter_unpack("=HBBI", sandbox_launcher.seccomp_filter(machine)))
    call, accumulator, place = struct.pack("=II", number, architecture), 0, 0
    while True:
        code, if_equal, if_not, operand = program[place]
        place += 1
        match code:
            case sandbox_launcher.LOAD:
                (accumulator,) = struct.unpack_from("=I", call, operand)
            case sandbox_launcher.AND:
                accumulator &= operand
            case sandbox_launcher.JUMP_IF_EQUAL:
                place += if_equal if accumulator == operand else if_not
            case sandbox_launcher.RETURN:
                return int(operand)


X32 = 0x40000000
KEYRING_CALLS = [
    ("x86_64", 0xC000003E, {248, 249, 250, 248 | X32, 249 | X32, 250 | X32}),
    ("x86_64", 0x40000003, {286, 287, 288}),
    ("aarch64", 0xC00000B7, {217, 218, 219}),
    ("aarch64", 0x40000028, {309, 310, 311}),
]


@pytest.mark.parametrize(("machine", "architecture", "numbers"), KEYRING_CALLS)
def test_seccomp_filter_refuses_keyring_calls_in_every_instruction_set(
    machine: str, architecture: int, numbers: set[int]
) -> None:
    calls = {*range(600), *(number | X32 for number in range(600)), 0xFFFFFFFF}
    refused = {
        one
        for one in calls
        if evaluate_seccomp_filter(machine, architecture, one) == sandbox_launcher.REFUSE
    }
    assert {number & ~X32 for number in refused} == {number & ~X32 for number in numbers}
    assert numbers <= refused
    assert {evaluate_seccomp_filter(machine, architecture, one) for one in calls - refused} == {
        sandbox_launcher.ALLOW
    }


def test_seccomp_filter_refuses_all_calls_of_unknown_instruction_set() -> None:
    for machine in sandbox_launcher.CALLS:
        assert evaluate_seccomp_filter(machine, 0xC0000016, 1) == sandbox_launcher.REFUSE


def test_sandbox_launcher_gives_program_a_new_session_keyring(tmp_path: Path) -> None:
    keyctl = sandbox_launcher.CALLS[os.uname().machine][0][-1]
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport ctypes; print(ctypes.CDLL(None).syscall({keyctl}, 0, -3, 0))"
    )
    program.chmod(0o755)
    launch = [sys.executable, "-I", "-S", sandbox_launcher.__file__]
    keyrings = {run_program(*way, str(program)) for way in ([], launch, launch)}
    assert len(keyrings) == 3


def run_program(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=True)  # noqa: S603 - no input from outside
    return done.stdout


QUOTA_PROGRAM = """
import ctypes, subprocess, sys
libc, add_key, keyctl, number = ctypes.CDLL(None), int(sys.argv[1]), int(sys.argv[2]), 0
libc.syscall(keyctl, 1, None)
while libc.syscall(add_key, b"user", b"%d" % number, b"x", 1, -2) != -1:
    number += 1
sys.exit(subprocess.run(sys.argv[3:]).returncode)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_sandbox_launcher_starts_program_for_user_at_kernel_key_quota() -> None:
    python = str(shutil.which("python3", path=os.defpath))
    launch = [python, "-I", "-S", "-c", inspect.getsource(sandbox_launcher), "/bin/echo"]
    add_key, _, keyctl = map(str, sandbox_launcher.CALLS[os.uname().machine][0][1:])
    done = subprocess.run(  # noqa: S603 - no input from outside
        [python, "-c", QUOTA_PROGRAM, add_key, keyctl, *launch],
        user=65533,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "--seccomp 3\n", "")


def test_sandbox_launcher_names_missing_program_in_error() -> None:
    words = [sys.executable, "-I", "-S", sandbox_launcher.__file__, "/no/such"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - no input from outside
    assert done.returncode == 1
    assert done.stderr == "/no/such cannot be started: No such file or directory\n"


async def test_sandbox_on_architecture_without_seccomp_filter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_launcher, "CALLS", {})
    machine = os.uname().machine
    found = await find_sandbox_problem(Bubblewrap(ProcessLimits()), tmp_path)
    assert found == f"its system calls cannot be filtered on {machine}"


KEYRING_CALLS_PROGRAM = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
calls = {"x86_64": (248, 249, 250), "aarch64": (217, 218, 219)}[os.uname().machine]
for number, *given in zip(calls, (b"user", b"user", 0), (b"workpool-test", b"x", -3)):
    print(libc.syscall(number, *given, b"secret", 6, -3), errno.errorcode[ctypes.get_errno()])
"""


async def test_sandboxed_session_cannot_use_kernel_keyrings(agent_with_sandbox: Any) -> None:
    output = await agent_with_sandbox.expect_tool_success(
        "bash", command=f"python3 -c {shlex.quote(KEYRING_CALLS_PROGRAM)}"
    )
    assert output == "-1 ENOSYS\n" * 3
    assert "Permission denied" in await agent_with_sandbox.expect_tool_error(
        "bash", command="cat /proc/keys"
    )


CALL_32_BIT_PROGRAM = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
# push rbx; mov eax, 288; mov ebx, 0; mov ecx, -3; mov edx, 0; int 0x80; pop rbx; ret
code.write(bytes.fromhex("53b820010000bb00000000b9fdffffffba00000000cd805bc3"))
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""


@pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="only x86-64 processors run this program"
)
async def test_sandboxed_session_cannot_use_keyrings_by_32_bit_calls(
    agent_with_sandbox: Any,
) -> None:
    here = await asyncio.create_subprocess_exec(sys.executable, "-c", CALL_32_BIT_PROGRAM)
    if await here.wait():
        pytest.skip("this kernel runs no 32-bit programs")
    assert (
        await agent_with_sandbox.expect_tool_success(
            "bash", command=f"python3 -c {shlex.quote(CALL_32_BIT_PROGRAM)}"
        )
        == "-38\n"
    )


async def test_in_memory_directories_share_one_size_limit(
    fake_agent_factory: Any, sandbox: Any
) -> None:
    agent = fake_agent_factory(
        isolation=dataclasses.replace(sandbox, limits=ProcessLimits(memory_mb=64))
    )
    await agent.expect_tool_success("bash", command="head -c 40M /dev/zero > /tmp/a")
    failed = await agent.expect_tool_error("bash", command="head -c 40M /dev/zero > /dev/shm/a")
    assert "No space left on device" in failed
    await agent.expect_tool_success(
        "bash", command="rm /dev/shm/a; head -c 10M /dev/zero > /dev/shm/a"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can bound the number of files")
async def test_in_memory_directories_hold_limited_number_of_files(
    fake_agent_factory: Any, sandbox: Any
) -> None:
    agent = fake_agent_factory(
        isolation=dataclasses.replace(sandbox, limits=ProcessLimits(memory_mb=64))
    )
    script = "cd /dev/shm && for n in {1..5000}; do : > $n || break; done; ls | wc -l"
    assert (
        await agent.expect_tool_success("bash", command=f"{{ {script}; }} 2>/dev/null") == "4094\n"
    )
    assert "No space left on device" in await agent.expect_tool_error(
        "bash", command="touch /tmp/a"
    )
    assert "superuser" in await agent.expect_tool_error(
        "bash", command="mount -o remount,nr_inodes=0 /tmp"
    )
