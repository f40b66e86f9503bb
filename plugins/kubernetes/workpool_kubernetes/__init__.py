"""A plugin of workpool that writes the deletion cost of the worker's own pod on Kubernetes."""

from workpool_kubernetes.plugin import Kubernetes

__all__ = ["Kubernetes"]
