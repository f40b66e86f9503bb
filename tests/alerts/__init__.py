"""Starts workers whose metrics make each alert rule fire in a real Prometheus."""
