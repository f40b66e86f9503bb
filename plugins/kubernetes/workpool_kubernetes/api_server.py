"""A client of the Kubernetes API server. It sets an annotation of the worker's own pod.

The time of a call and the size of an answer are limited. Every failure is an `APIServerError`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import aiohttp

from workpool import DaemonThreads, WorkpoolError

if TYPE_CHECKING:
    from typing import Self

    from workpool_kubernetes.own_pod import OwnPod

CALL_SECONDS: Final = 10.0
"""The time limit of one call, in seconds."""
MAX_ANSWER_BYTES: Final = 4096
"""The number of bytes that are read from an answer with an error."""
MAX_MESSAGE_CHARACTERS: Final = 300
"""The number of characters of the API server's message that are reported."""
MERGE_PATCH: Final = "application/merge-patch+json"
ROLE_HINT: Final = 'see plugins/kubernetes/README.md, "Permissions"'


class APIServerError(WorkpoolError):
    """The API server refused a call or did not answer it."""


class PodClient:
    """A client of the API server for one pod, used as an async context manager."""

    def __init__(self, pod: OwnPod) -> None:
        self._pod = pod
        self._url = f"{pod.server}/api/v1/namespaces/{pod.namespace}/pods/{pod.name}"
        self._threads = DaemonThreads("workpool-kubernetes", 1)
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the connection pool.

        Raises:
            APIServerError: The file of the CA is no certificate, or cannot be read.
        """
        try:
            context = ssl.create_default_context(cafile=self._pod.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise APIServerError(f"{self._pod.ca_file} holds no certificate: {error}") from None
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=1),
            timeout=aiohttp.ClientTimeout(total=CALL_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connection pool, and end the thread that reads the token file."""
        if self._http is not None:
            await self._http.close()
        await self._threads.close()

    async def set_annotation(self, name: str, value: int) -> None:
        """Set one annotation of the pod to a number.

        Raises:
            APIServerError: The API server refused the call, or did not answer in time.
        """
        if self._http is None:
            raise RuntimeError("the client is not open")
        body = json.dumps({"metadata": {"annotations": {name: str(value)}}})
        try:
            async with (
                asyncio.timeout(CALL_SECONDS),
                self._http.patch(
                    self._url,
                    data=body,
                    headers={
                        "Authorization": f"Bearer {await self._read_token()}",
                        "Content-Type": MERGE_PATCH,
                    },
                    # Refuse redirects, which could send the token to another server.
                    allow_redirects=False,
                ) as answer,
            ):
                if answer.status != HTTPStatus.OK:
                    raise self._error_for_status(
                        answer.status, await _read_start_of_body(answer.content)
                    )
        except TimeoutError:
            raise APIServerError(f"no answer within {CALL_SECONDS:.0f} s") from None
        except aiohttp.ClientError as error:
            raise APIServerError(f"{type(error).__name__}: {error}") from None

    async def _read_token(self) -> str:
        """Read the token from its file, which the kubelet replaces from time to time."""
        file = self._pod.token_file
        try:
            token = (await self._threads.run(file.read_text)).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise APIServerError(f"{file} cannot be read: {type(error).__name__}") from None
        if not token or not token.isascii() or not token.isprintable():
            raise APIServerError(f"{file} holds no token")
        return token

    def _error_for_status(self, status: int, body: bytes) -> APIServerError:
        pod = self._pod
        texts = {
            401: f"the API server refuses the token in {pod.token_file}",
            403: f"the service account may not patch the pod {pod.name}: in namespace"
            f" {pod.namespace}, it needs a Role with the verb patch for pods, and a RoleBinding;"
            f" {ROLE_HINT}",
            404: f"namespace {pod.namespace} has no pod {pod.name}: set POD_NAME from"
            " metadata.name",
        }
        text = texts.get(status, f"the API server answered {status}")
        message = _message_of_error_body(body)
        return APIServerError(f"{text} ({message})" if message else text)


async def _read_start_of_body(content: aiohttp.StreamReader) -> bytes:
    try:
        return await content.readexactly(MAX_ANSWER_BYTES)
    except asyncio.IncompleteReadError as error:
        return error.partial


def _message_of_error_body(body: bytes) -> str:
    """Return the field `message` of an error's body, cut to a limit, or "" without this field."""
    with suppress(ValueError, AttributeError):
        message = json.loads(body).get("message")
        if isinstance(message, str):
            return message[:MAX_MESSAGE_CHARACTERS]
    return ""
