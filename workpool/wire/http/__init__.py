"""The sending of one HTTP request: rate limits, connections, credentials, time limits, answers."""
