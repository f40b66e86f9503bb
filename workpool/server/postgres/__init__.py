"""The control plane on PostgreSQL, where any number of nodes share one database."""
