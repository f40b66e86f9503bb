"""Refused starts of the plugin, and the removal of leftover containers after a start."""

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
from workpool_container.options import Options
from workpool_container.run import CONTAINER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from plugins.container.tests.conftest import Scene
    from plugins.container.tests.engines import Podman
    from workpool.testing import Kit


async def refused(scene: Scene, **options: Any) -> str:
    """Return the text of the error with which the plugin refuses to start."""
    with pytest.raises(PluginError) as caught:
        await scene.pool("true", **options).__aenter__()
    return str(caught.value)


async def test_missing_engine_ends_worker_with_status_2(tmp_path: Path) -> None:
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
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WORKPOOL_")}
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workpool", "run", "--config", str(tmp_path / "pool.toml")),
        env=plain,
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
    beside = Container(image="any", mounts=[f"{tmp_path}/a:/a"], socket=str(tmp_path / "none"))
    with pytest.raises(PluginError, match="no container engine answers"):
        async with workpool.pool(beside, token=None, token_file=tmp_path / "link"):
            pass


async def test_missing_image_is_error_at_start(scene: Scene) -> None:
    text = await refused(scene, image="localhost/absent:1")
    assert "image localhost/absent:1 is not on the engine at " in text
    assert "pull = 'missing'" in text


@asynccontextmanager
async def registry(podman: Podman, folder: Path) -> AsyncIterator[str]:
    """Serve an image that `podman push` wrote, as a registry does; yield the image's name."""
    podman.run("push", "--format=v2s2", podman.image, f"dir:{folder}")
    manifest = (folder / "manifest.json").read_bytes()
    kind = json.loads(manifest)["mediaType"]
    app = web.Application()

    async def answer(_: web.Request) -> web.Response:
        return web.Response()

    async def tell(_: web.Request) -> web.Response:
        return web.Response(body=manifest, content_type=kind)

    async def give(request: web.Request) -> web.FileResponse:
        return web.FileResponse(folder / request.match_info["digest"])

    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"errors": [{"code": "MANIFEST_UNKNOWN"}]}, status=404)

    app.router.add_get("/v2/", answer)
    app.router.add_get("/v2/given/manifests/{reference}", tell)
    app.router.add_get("/v2/given/blobs/sha256:{digest}", give)
    app.router.add_get("/v2/withheld/manifests/{reference}", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.SockSite(runner, podman.registry).start()
        yield f"localhost:{podman.registry.getsockname()[1]}/given:1"
    finally:
        await runner.cleanup()


async def test_missing_image_is_pulled_if_setting_allows(
    scene: Scene, podman: Podman, tmp_path: Path
) -> None:
    async with registry(podman, tmp_path) as image:
        assert "is not on the engine" in await refused(scene, image=image)
        finished = await scene.run("exit 0", image=image, pull="missing")
        assert finished.outcome == "completed"
        other = image.replace("given", "withheld")
        assert f"image {other} cannot be pulled: " in await refused(
            scene, image=other, pull="missing"
        )


def test_every_invalid_setting_is_named_without_its_value() -> None:
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
    ("given", "asked"),
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
    given: str, asked: str | None
) -> None:
    if asked is None:
        with pytest.raises(ValueError, match=r"mounts\.0"):
            Options.read({"image": "i", "mounts": [given]})
    else:
        assert Options.read({"image": "i", "mounts": [given]}).mounts == (asked,)


async def left_behind(scene: Scene, work_id: str) -> str:
    """Start a container of this item that has no worker, and return the container's id."""
    labels = {
        "workpool.work_id": work_id,
        "workpool.environment_id": scene.plane.environments[0],
    }
    made = await scene.docker.containers.create(
        {
            "Image": scene.options["image"],
            "Cmd": ["/bin/sh", "-c", scene.forever],
            "Labels": labels,
            "HostConfig": {"NetworkMode": "none"},
        }
    )
    await made.start()
    return made.id


async def test_leftover_containers_are_removed_except_those_that_may_be_adopted(
    scene: Scene,
) -> None:
    stopped, superseded, adoptable = (item.id for item in scene.plane.enqueue(count=3))
    unknown = "work_" + "0" * 32
    work_ids = (stopped, superseded, adoptable, unknown)
    container = {work_id: await left_behind(scene, work_id) for work_id in work_ids}
    async with WorkClient(scene.settings()) as rival:
        await rival.stop(stopped, force=True)
        await rival.ack(superseded)
        await rival.update_metadata(superseded, {CONTAINER: "of another engine"})
        await rival.update_metadata(adoptable, {CONTAINER: container[adoptable]})

    def judged(times: int) -> bool:
        gets = [request.work_id for request in scene.faults.of("get")]
        return min(gets.count(adoptable), gets.count(unknown)) >= times

    async def swept_twice() -> bool:
        return judged(2)

    async with scene.pool("true", sweep_seconds=0.1, metadata={"job": "none"}):
        await scene.until(swept_twice)
    left = {each.id for each in await scene.docker.containers.list()}
    assert left == {container[adoptable], container[unknown]}
