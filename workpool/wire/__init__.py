"""The wire: what worker and control plane say to each other (protocol.md), as a client."""
