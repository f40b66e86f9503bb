"""A port of the loopback interface on which only the servers of one test can listen."""

from __future__ import annotations

import socket
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def reserve_port() -> Iterator[int]:
    """Yield a free port that the system gives to no other program before the end of the block.

    Servers with SO_REUSEADDR can listen on the port, one after another. While none listens, each
    connection is refused. A port that was only free a moment ago could already belong to another
    test, or to the client itself: without the reservation, a client of the loopback interface that
    connects to its own source port is connected to itself.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port: int = reserved.getsockname()[1]
        if sys.platform != "linux":
            reserved.close()  # Other systems let no second socket bind to the same address.
        yield port
