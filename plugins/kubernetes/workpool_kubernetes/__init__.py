"""The deletion cost of the worker's own pod on Kubernetes: a plugin of workpool."""

from workpool_kubernetes.plugin import Kubernetes

__all__ = ["Kubernetes"]
