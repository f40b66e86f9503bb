"""The pool: it polls for items, holds their leases and runs their handlers.

Start at `session_runner.py`, the main path of one item.
See workpool/docs/architecture.md, "The path of one item" and "Threads and loops".
"""
