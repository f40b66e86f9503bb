"""The pool: it polls for items, holds their leases and runs their handlers.

Start at `poller.py`, which receives an item, and go on with `dispatcher.py`, which chooses its
handler, and `session_runner.py`, which runs it.
See workpool/docs/architecture.md, "The path of one item" and "Threads and loops".
"""
