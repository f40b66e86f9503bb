"""The events of a session: list, send, stream."""
