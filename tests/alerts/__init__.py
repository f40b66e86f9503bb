"""Real firings of the alert rules: Prometheus, control planes and workers, one cause each."""
