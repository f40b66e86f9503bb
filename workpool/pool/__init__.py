"""The pool: pollers, bounded queue, dispatcher, leases, keeper, supervisor (design §1)."""
