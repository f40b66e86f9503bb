"""Parsers of clients' requests. Each parser returns values or raises a 400."""
