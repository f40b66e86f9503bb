"""The stores, in which the control plane's state outlives the process."""
