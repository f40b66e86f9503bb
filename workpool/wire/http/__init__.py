"""Sending one request over HTTP: rate limit, connection, check, bytes, answer."""
