"""A plugin of workpool that runs a container for each session, through the Docker API."""

from workpool_container.container_run import ContainerFailed
from workpool_container.engine_client import EngineError
from workpool_container.options import ItemTooLarge
from workpool_container.plugin import Container

__all__ = ["Container", "ContainerFailed", "EngineError", "ItemTooLarge"]
