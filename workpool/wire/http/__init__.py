"""Sends one HTTP request: rate limits, connections, credentials and timeouts."""
