"""Runs of workers that make each alert rule fire in a real Prometheus."""
