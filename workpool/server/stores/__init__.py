"""The stores: where the control plane saves its state, in memory or in a SQLite file."""
