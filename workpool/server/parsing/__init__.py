"""Parsers of what clients send: each returns values or raises a 400, before any effect."""
