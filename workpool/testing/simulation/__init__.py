"""Simulation of whole pools in virtual time: seeded schedules, judged by invariants."""
