"""The program that starts bubblewrap without access to the kernel's key rings.

The program is run by its path with `python -I -S`, uses the standard library only, and replaces
itself by bubblewrap, whose command line is in the arguments. A process inherits the session keyring
of the worker, which may contain tickets and disk keys, and processes with the same keyring can
exchange data. A sandbox therefore gets a session keyring of its own, and a seccomp filter refuses
the three system calls for keys in all instruction sets of the processor.
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
"""The system calls for keys by machine name, for 64-bit programs and for 32-bit programs.

Each entry has the kernel's number of the instruction set (`AUDIT_ARCH_…`), then the numbers of
`add_key`, `request_key` and `keyctl`.
"""

LOAD, AND, JUMP_IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
NUMBER, ARCHITECTURE = 0, 4
"""The offsets of the call's number and of the instruction set in the filter's input."""
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.ENOSYS
NOT_X32 = ~0x40000000 & 0xFFFFFFFF
"""The mask that clears the bit of x32, the third instruction set of x86-64."""
JOIN_SESSION_KEYRING = 1


def seccomp_filter(machine: str) -> bytes:
    """Return a seccomp filter that refuses the system calls for keys and allows all others."""
    program = [(LOAD, 0, 0, ARCHITECTURE)]
    for architecture, *numbers in CALLS[machine]:
        skipped = range(len(numbers), 0, -1)
        block = [
            (LOAD, 0, 0, NUMBER),
            (AND, 0, 0, NOT_X32),
            *(
                (JUMP_IF_EQUAL, skip, 0, number)
                for skip, number in zip(skipped, numbers, strict=True)
            ),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, REFUSE),
        ]
        program += [(JUMP_IF_EQUAL, 0, len(block), architecture), *block]
    # Refuse all system calls of an unknown instruction set.
    program.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def join_new_session_keyring(machine: str) -> None:
    """Join a new session keyring for this process and the program that replaces it.

    Raises:
        OSError: The kernel refuses a keyring.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    keyctl = ctypes.c_long(CALLS[machine][0][-1])
    if libc.syscall(keyctl, ctypes.c_long(JOIN_SESSION_KEYRING), None) == -1:
        number = ctypes.get_errno()
        # Continue if the kernel has no key rings, refuses a key ring to this worker, or has reached
        # its limit of 200 keys. The seccomp filter is then the only protection.
        if number not in {errno.ENOSYS, errno.EPERM, errno.EDQUOT}:
            raise OSError(number, os.strerror(number))


def main() -> int:
    """Replace this process by the program and arguments of the command line."""
    program, *arguments = sys.argv[1:]
    machine = os.uname().machine
    try:
        join_new_session_keyring(machine)
        opened = os.memfd_create("seccomp", 0)
        os.write(opened, seccomp_filter(machine))
        os.lseek(opened, 0, os.SEEK_SET)
        # Restore the default action of these signals. Python ignores the signals, and otherwise the
        # program would also ignore them.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(program, [program, "--seccomp", str(opened), *arguments])  # noqa: S606 - no shell
    except OSError as error:
        sys.stderr.write(f"{program} cannot be started: {error.strerror}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
