"""Parsers of clients' requests: each returns values or raises a 400, before any effect."""
