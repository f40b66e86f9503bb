"""The client's calls for the events of a session: list, send and stream."""
