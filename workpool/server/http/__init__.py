"""The control plane over HTTP: routes, permissions, and answers in the format of each dialect."""
