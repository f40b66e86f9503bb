"""The program that starts bubblewrap without access to the kernel's key rings.

It uses the standard library only, is run by its path with `python -I -S`, and replaces itself by
its arguments, the command line of bubblewrap. A process inherits the session keyring of the worker,
with tickets and disk keys, and all processes of one keyring can talk through it. So a sandbox gets
a session keyring of its own, and the three system calls about keys are answered as by a kernel
without them, whichever of the processor's instruction sets a program uses.
"""

import ctypes
import errno
import os
import signal
import struct
import sys

CALLS = {
    "x86_64": ((0xC000003E, 248, 249, 250), (0x40000003, 286, 287, 288)),
    "aarch64": ((0xC00000B7, 217, 218, 219), (0x40000028, 309, 310, 311)),
}
"""Numbers by machine name: of 64-bit programs such as this one, and of 32-bit programs.

First `AUDIT_ARCH_…`, by which the kernel knows the instruction set, then the numbers of `add_key`,
`request_key` and `keyctl`.
"""

LOAD, AND, JUMP_IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
NUMBER, ARCHITECTURE = 0, 4
"""The offsets of the call's number and of the instruction set for the filter."""
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.ENOSYS
NOT_X32 = ~0x40000000 & 0xFFFFFFFF
"""x86-64's third instruction set, x32, has the same numbers with this bit set."""
JOIN_SESSION_KEYRING = 1


def seccomp_filter(machine: str) -> bytes:
    """Return the filter that refuses the calls about keys and allows all others."""
    program = [(LOAD, 0, 0, ARCHITECTURE)]
    for architecture, *numbers in CALLS[machine]:
        refuse = range(len(numbers), 0, -1)  # The number of instructions to skip.
        block = [
            (LOAD, 0, 0, NUMBER),
            (AND, 0, 0, NOT_X32),
            *((JUMP_IF_EQUAL, far, 0, number) for far, number in zip(refuse, numbers, strict=True)),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, REFUSE),
        ]
        program += [(JUMP_IF_EQUAL, 0, len(block), architecture), *block]
    program.append((RETURN, 0, 0, REFUSE))  # Refuse all calls on an unknown processor.
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def leave_session_keyring(machine: str) -> None:
    """Join a new session keyring, for this process and the program that replaces it.

    Raises:
        OSError: The kernel refuses a keyring.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    keyctl = ctypes.c_long(CALLS[machine][0][-1])
    if libc.syscall(keyctl, ctypes.c_long(JOIN_SESSION_KEYRING), None) == -1:
        number = ctypes.get_errno()
        # The kernel has no key rings, or refuses one to this worker, or the worker has used its
        # 200: the filter alone must do.
        if number not in {errno.ENOSYS, errno.EPERM, errno.EDQUOT}:
            raise OSError(number, os.strerror(number))


def main() -> int:
    """Replace this process by the program of the arguments."""
    program, *arguments = sys.argv[1:]
    machine = os.uname().machine
    try:
        leave_session_keyring(machine)
        opened = os.memfd_create("seccomp", 0)
        os.write(opened, seccomp_filter(machine))
        os.lseek(opened, 0, os.SEEK_SET)
        # Python ignores these signals, and a program would inherit that.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(program, [program, "--seccomp", str(opened), *arguments])  # noqa: S606 - no shell
    except OSError as error:
        sys.stderr.write(f"{program} cannot be started: {error.strerror}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
