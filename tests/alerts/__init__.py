"""Runs that make each alert rule fire in a real Prometheus, each by its own cause."""
