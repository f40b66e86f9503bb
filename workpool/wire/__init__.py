"""The client side of the protocol between worker and control plane."""
