"""`workpool demo`."""


def demo() -> None:
    """Show it all."""
