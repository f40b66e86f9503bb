"""Where the control plane's state outlives the process."""
