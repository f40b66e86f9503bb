"""Whole pools in virtual time: seeded schedules, a history, and the promise as invariants."""
