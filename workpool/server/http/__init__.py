"""The control plane over HTTP: routes, permissions, and the answers of each dialect."""
