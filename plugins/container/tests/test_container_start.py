"""Tests of the plugin's start: refused settings, pulled images, and leftover containers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from workpool import PluginError, WorkClient
from workpool_container import Container
from workpool_container.container_run import CONTAINER_ID_KEY
from workpool_container.options import ContainerOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from plugins.container.tests.conftest import ContainerTestbed
    from plugins.container.tests.engines import PodmanEngine
    from workpool.testing import Kit


async def catch_start_error(testbed: ContainerTestbed, **options: Any) -> str:
    """Return the text of the error with which the plugin refuses to start."""
    with pytest.raises(PluginError) as caught:
        await testbed.make_pool("true", **options).__aenter__()
    return str(caught.value)


async def test_worker_without_container_engine_exits_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "pool.toml").write_text(
        f"""
        [workpool]
        base_url = "http://127.0.0.1:9"
        token = "the-token"
        environment_id = "env_1"
        plugins = ["container"]
        metrics_listen = "off"
        [workpool.plugin.container]
        image = "any"
        socket = "{tmp_path}/engine.sock"
        """
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WORKPOOL_")
    }
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workpool", "run", "--config", str(tmp_path / "pool.toml")),
        env=environment,
        stderr=asyncio.subprocess.PIPE,
    )
    _, text = await worker.communicate()
    assert worker.returncode == 2
    assert f"no container engine answers at {tmp_path}/engine.sock" in text.decode()
    assert "systemctl start podman.socket" in text.decode()


async def test_mount_that_exposes_token_file_is_refused(workpool: Kit, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/token").write_text(workpool.server.token or "")
    (tmp_path / "link").symlink_to("secrets/token")
    for source in (tmp_path, tmp_path / "secrets", tmp_path / "secrets/token"):
        plugin = Container(image="any", mounts=[f"{source}:/shown"], socket=str(tmp_path / "none"))
        with pytest.raises(PluginError, match="shows the token file"):
            async with workpool.pool(plugin, token=None, token_file=tmp_path / "link"):
                pass
    harmless = Container(image="any", mounts=[f"{tmp_path}/a:/a"], socket=str(tmp_path / "none"))
    with pytest.raises(PluginError, match="no container engine answers"):
        async with workpool.pool(harmless, token=None, token_file=tmp_path / "link"):
            pass


async def test_pool_start_raises_plugin_error_if_container_image_is_missing(
    testbed: ContainerTestbed,
) -> None:
    text = await catch_start_error(testbed, image="localhost/absent:1")
    assert "image localhost/absent:1 is not on the engine at " in text
    assert "pull = 'missing'" in text


@asynccontextmanager
async def image_registry(podman: PodmanEngine, directory: Path) -> AsyncIterator[str]:
    """Run an image registry that has the test image. Yield the image's name in this registry."""
    podman.run_command("push", "--format=v2s2", podman.image, f"dir:{directory}")
    manifest = (directory / "manifest.json").read_bytes()
    kind = json.loads(manifest)["mediaType"]
    app = web.Application()

    async def answer_version_request(_: web.Request) -> web.Response:
        return web.Response()

    async def answer_manifest_request(_: web.Request) -> web.Response:
        return web.Response(body=manifest, content_type=kind)

    async def answer_blob_request(request: web.Request) -> web.FileResponse:
        return web.FileResponse(directory / request.match_info["digest"])

    async def answer_request_for_unknown_image(_: web.Request) -> web.Response:
        return web.json_response({"errors": [{"code": "MANIFEST_UNKNOWN"}]}, status=404)

    app.router.add_get("/v2/", answer_version_request)
    app.router.add_get("/v2/given/manifests/{reference}", answer_manifest_request)
    app.router.add_get("/v2/given/blobs/sha256:{digest}", answer_blob_request)
    app.router.add_get("/v2/withheld/manifests/{reference}", answer_request_for_unknown_image)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.SockSite(runner, podman.registry).start()
        yield f"localhost:{podman.registry.getsockname()[1]}/given:1"
    finally:
        await runner.cleanup()


async def test_missing_image_is_pulled_only_if_pull_setting_allows_it(
    testbed: ContainerTestbed, podman: PodmanEngine, tmp_path: Path
) -> None:
    async with image_registry(podman, tmp_path) as image:
        assert "is not on the engine" in await catch_start_error(testbed, image=image)
        finished = await testbed.run_item("exit 0", image=image, pull="missing")
        assert finished.outcome == "completed"
        other = image.replace("given", "withheld")
        assert f"image {other} cannot be pulled: " in await catch_start_error(
            testbed, image=other, pull="missing"
        )


def test_container_settings_error_names_every_invalid_setting_but_shows_no_value() -> None:
    with pytest.raises(ValueError, match="pull") as caught:
        Container(
            pull="secret-1",
            mounts=["secret-2"],
            memory="secret-3",
            environment={"A": 1},
            colour="secret-4",
            grace=0,
        )
    text = str(caught.value)
    named = ("image", "pull", "mounts.0", "memory", "environment.A", "colour", "grace")
    assert all(f"{name}: " in text for name in named)
    assert "secret-" not in text


@pytest.mark.parametrize(
    ("setting", "mount"),
    [
        ("/a:/b", "/a:/b:ro"),
        ("/a:/b:rw", "/a:/b:rw"),
        ("volume:/b:ro", "volume:/b:ro"),
        ("a/b:/b", None),
        ("/a:b", None),
        ("/a:/b:z", None),
        ("/a", None),
    ],
)
def test_mount_is_read_only_by_default_and_refused_if_malformed(
    setting: str, mount: str | None
) -> None:
    if mount is None:
        with pytest.raises(ValueError, match=r"mounts\.0"):
            ContainerOptions.from_settings({"image": "i", "mounts": [setting]})
    else:
        assert ContainerOptions.from_settings({"image": "i", "mounts": [setting]}).mounts == (
            mount,
        )


async def start_leftover_container(testbed: ContainerTestbed, work_id: str) -> str:
    """Start a container of this item without a worker, and return the container's id."""
    labels = {
        "workpool.work_id": work_id,
        "workpool.environment_id": testbed.plane.environments[0],
    }
    created = await testbed.docker_client.containers.create(
        {
            "Image": testbed.options["image"],
            "Cmd": ["/bin/sh", "-c", testbed.endless_script],
            "Labels": labels,
            "HostConfig": {"NetworkMode": "none"},
        }
    )
    await created.start()
    return created.id


async def test_worker_removes_abandoned_containers_but_keeps_adoptable_and_unknown_ones(
    testbed: ContainerTestbed,
) -> None:
    stopped, superseded, adoptable = (item.id for item in testbed.plane.enqueue(count=3))
    unknown = "work_" + "0" * 32
    work_ids = (stopped, superseded, adoptable, unknown)
    container = {work_id: await start_leftover_container(testbed, work_id) for work_id in work_ids}
    async with WorkClient(testbed.pool_settings()) as other_worker:
        await other_worker.stop(stopped, force=True)
        await other_worker.ack(superseded)
        await other_worker.update_metadata(superseded, {CONTAINER_ID_KEY: "of another engine"})
        await other_worker.update_metadata(adoptable, {CONTAINER_ID_KEY: container[adoptable]})

    async def both_items_were_read_twice() -> bool:
        gets = [request.work_id for request in testbed.faults.of("get")]
        return min(gets.count(adoptable), gets.count(unknown)) >= 2

    async with testbed.make_pool("true", sweep_seconds=0.1, metadata={"job": "none"}):
        await testbed.wait_until_true(both_items_were_read_twice)
    left = {each.id for each in await testbed.docker_client.containers.list()}
    assert left == {container[adoptable], container[unknown]}
