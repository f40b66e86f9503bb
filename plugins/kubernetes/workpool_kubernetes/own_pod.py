"""Finds this process's pod and the cluster's API server, from environment variables and files."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from workpool import WorkpoolError

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""The directory of the service account's token, the CA and the namespace."""
POD_NAME: Final = "POD_NAME"
"""The environment variable with the name of the pod, which the downward API sets."""
_NAME_PATTERN: Final = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")


class NoPodError(WorkpoolError):
    """The process does not run in a pod with the token of a service account."""


@dataclass(frozen=True, slots=True)
class OwnPod:
    """The pod in which this process runs.

    Attributes:
        namespace: The namespace of the pod.
        name: The name of the pod.
        server: The URL of the API server.
        token_file: The file with the token of the service account. The kubelet replaces the file
            within an hour.
        ca_file: The certificates in PEM with which the API server is verified.
    """

    namespace: str
    name: str
    server: str
    token_file: Path
    ca_file: Path


def find_own_pod(environment: Mapping[str, str], directory: Path, name: str | None) -> OwnPod:
    """Return the pod in which this process runs.

    Args:
        environment: The variables of the process.
        directory: The directory of the service account.
        name: The name of the pod; None: the variable `POD_NAME`, or else the host name.

    Raises:
        NoPodError: The process does not run in a pod, or the pod has no token.
    """
    pod = name or environment.get(POD_NAME) or socket.gethostname()
    if not _NAME_PATTERN.fullmatch(pod):
        raise NoPodError(f"{pod!r} is not the name of a pod: set {POD_NAME} from metadata.name")
    server = _api_server_url(environment)
    missing = [file for file in ("token", "ca.crt", "namespace") if not (directory / file).exists()]
    if missing:
        raise NoPodError(
            f"{directory} has no {', '.join(missing)}: the pod needs a service account and"
            " automountServiceAccountToken: true"
        )
    namespace = _read_namespace(directory / "namespace")
    return OwnPod(namespace, pod, server, directory / "token", directory / "ca.crt")


def _api_server_url(environment: Mapping[str, str]) -> str:
    host = environment.get("KUBERNETES_SERVICE_HOST", "")
    port = environment.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port.isdecimal():
        raise NoPodError(
            "not in a pod of Kubernetes: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are"
            " not set"
        )
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _read_namespace(file: Path) -> str:
    try:
        namespace = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NoPodError(f"{file} cannot be read: {error}") from None
    if not _NAME_PATTERN.fullmatch(namespace):
        raise NoPodError(f"{file} holds no name of a namespace")
    return namespace
