"""The Kubernetes manifests are valid, fit each other and fit the settings of the worker."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import jsonschema
import kubernetes_validate
import pytest
import yaml

from workpool import Settings
from workpool.metrics.definitions import DEFINITIONS
from workpool.pool.lease import RENEW_PART
from workpool.server import ControlPlane
from workpool.settings import lease_margin

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "workpool/deploy/kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
OVERLAYS = ("base", "overlays/monitored", "overlays/autoscaled", "overlays/job-per-session")
VERSIONS = ("1.30", "1.37")
"""The oldest and the newest Kubernetes that the manifests are validated for."""
KUBECTL = (1, 22)
"""The oldest kubectl whose `kustomize` knows the fields used here."""

Manifest = dict[str, Any]


def manifests(text: str) -> list[Manifest]:
    return [each for each in yaml.safe_load_all(text) if each is not None]


def files() -> list[Manifest]:
    """Return all manifests of the YAML files."""
    paths = [
        path
        for path in sorted(KUBERNETES.rglob("*.yaml"))
        if path.name not in {"kustomization.yaml", "namereference.yaml"}
    ]
    return [each for path in paths for each in manifests(path.read_text())]


def of_kind(found: list[Manifest], kind: str) -> Manifest:
    [one] = [each for each in found if each["kind"] == kind]
    return one


def pod_of(manifest: Manifest) -> Manifest:
    """Return the spec of the pod template of a Deployment or a ScaledJob."""
    spec = manifest["spec"]
    pod: Manifest = spec.get("jobTargetRef", spec)["template"]["spec"]
    return pod


def container_of(manifest: Manifest) -> Manifest:
    [container] = pod_of(manifest)["containers"]
    return dict(container)


@pytest.fixture(scope="module")
def kubectl() -> str:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    words = [program, "version", "--client", "--output=json"]
    version = json.loads(subprocess.check_output(words))["clientVersion"]  # noqa: S603 - our own words
    if (int(version["major"]), int(re.sub(r"\D", "", version["minor"]))) < KUBECTL:
        pytest.skip(f"kubectl {version['gitVersion']} has an old kustomize")
    return program


def render(kubectl: str, folder: Path) -> list[Manifest]:
    done = subprocess.run(  # noqa: S603 - our own words
        [kubectl, "kustomize", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return manifests(done.stdout)


def with_deletion_cost(overlay: str, folder: Path) -> Path:
    """Write an overlay as plugins/kubernetes/README.md says, and return its directory."""
    checkout = os.path.relpath(KUBERNETES, folder)  # Kustomize wants relative paths
    kustomization = {
        "resources": [f"{checkout}/{overlay}"],
        "components": [f"{checkout}/components/deletion-cost"],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


@pytest.fixture(params=OVERLAYS)
def rendered(kubectl: str, request: pytest.FixtureRequest) -> list[Manifest]:
    """Return the manifests of one overlay."""
    return render(kubectl, KUBERNETES / request.param)


def natives(found: list[Manifest]) -> Iterator[Manifest]:
    """Return the manifests of Kubernetes itself, and the job of a ScaledJob as one of them."""
    for each in found:
        if each["kind"] == "ScaledJob":
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": each["metadata"]}
            yield job | {"spec": each["spec"]["jobTargetRef"]}
        elif not schema_of(each).exists():
            yield each


def schema_of(manifest: Manifest) -> Path:
    return SCHEMAS / f"{manifest['kind'].lower()}.json"


def check_custom(manifest: Manifest) -> None:
    schema = json.loads(schema_of(manifest).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)


def check_native(manifest: Manifest, version: str = VERSIONS[-1]) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_of_an_overlay_are_valid_for_kubernetes(
    rendered: list[Manifest], version: str
) -> None:
    for each in natives(rendered):
        check_native(each, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_in_files_are_valid_for_kubernetes(version: str) -> None:
    """The check also runs on a machine without kubectl."""
    for each in natives(files()):
        check_native(each, version)


def test_custom_resources_have_known_fields_only() -> None:
    custom = [each for each in files() if schema_of(each).exists()]
    assert {each["kind"] for each in custom} == {
        *("PodMonitor", "ScaledJob", "ScaledObject", "TriggerAuthentication")
    }
    for each in custom:
        check_custom(each)


def test_unknown_field_of_a_manifest_is_found() -> None:
    for each in files():
        wrong = copy.deepcopy(each)
        wrong.get("spec", wrong)["minReplicas"] = 1
        check = check_custom if schema_of(wrong).exists() else check_native
        with pytest.raises(jsonschema.ValidationError):
            check(wrong)


def test_kustomization_lists_every_file_of_its_folder() -> None:
    for path in sorted(KUBERNETES.rglob("kustomization.yaml")):
        kustomization = yaml.safe_load(path.read_text())
        listed = {*kustomization["resources"], *kustomization.get("configurations", ())}
        for generator in kustomization.get("configMapGenerator", ()):
            listed.update(generator["files"])
        beside = {each.name for each in path.parent.iterdir() if each.is_file()} - {path.name}
        assert {name for name in listed if not name.startswith("../")} == beside, path
        for name in listed - beside:
            assert (path.parent / name / "kustomization.yaml").is_file(), name


def test_names_in_an_overlay_resolve_within_it(rendered: list[Manifest]) -> None:
    """All secrets are created by the operator, with this credential only."""
    names = {(each["kind"], each["metadata"]["name"]) for each in rendered}
    for each in rendered:
        if each["kind"] in {"Deployment", "ScaledJob"}:
            pod = pod_of(each)
            assert ("ServiceAccount", pod["serviceAccountName"]) in names
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert ("ConfigMap", volumes["settings"]["configMap"]["name"]) in names
            assert volumes["token"]["secret"]["secretName"] == "workpool-token"
            mounted = {mount["name"] for mount in container_of(each)["volumeMounts"]}
            assert mounted == set(volumes)
        if each["kind"] == "ScaledObject":
            assert ("Deployment", each["spec"]["scaleTargetRef"]["name"]) in names
        for trigger in each.get("spec", {}).get("triggers", ()):
            if "authenticationRef" in trigger:
                assert ("TriggerAuthentication", trigger["authenticationRef"]["name"]) in names


def test_selectors_of_an_overlay_match_its_pods(rendered: list[Manifest]) -> None:
    [worker] = [each for each in rendered if each["kind"] in {"Deployment", "ScaledJob"}]
    spec = worker["spec"]
    labels = spec.get("jobTargetRef", spec)["template"]["metadata"]["labels"]
    selectors = [
        each["spec"].get("podSelector", each["spec"].get("selector"))["matchLabels"]
        for each in rendered
        if each["kind"] in {"NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "Deployment"}
    ]
    assert selectors
    for selector in selectors:
        assert selector.items() <= labels.items()


def test_example_of_the_page_sets_image_settings_and_namespace(
    kubectl: str, tmp_path: Path
) -> None:
    page = (ROOT / "workpool/docs/operating.md").read_text()
    [example] = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", page, re.DOTALL)
    checkout = os.path.relpath(ROOT, tmp_path)  # Kustomize wants relative paths
    (tmp_path / "kustomization.yaml").write_text(example.replace("PATH/TO", checkout))
    (tmp_path / "workpool.toml").write_text('[workpool]\nplugins = ["reports"]\n')
    found = render(kubectl, tmp_path)
    assert container_of(of_kind(found, "Deployment"))["image"] == "registry.example/reports:3"
    assert "reports" in of_kind(found, "ConfigMap")["data"]["workpool.toml"]
    assert {each["metadata"]["namespace"] for each in found} == {"workers"}
    for each in natives(found):
        check_native(each)


def test_autoscaled_deployment_leaves_the_number_of_pods_to_keda(kubectl: str) -> None:
    found = render(kubectl, KUBERNETES / "overlays/autoscaled")
    assert "replicas" not in of_kind(found, "Deployment")["spec"]


def test_deletion_cost_component_gives_pods_a_token_a_name_and_the_role(
    kubectl: str, tmp_path: Path
) -> None:
    found = render(kubectl, with_deletion_cost("overlays/autoscaled", tmp_path))
    for each in natives(found):
        check_native(each)
    deployment = of_kind(found, "Deployment")
    assert pod_of(deployment)["automountServiceAccountToken"] is True
    variables = {each["name"]: each for each in container_of(deployment)["env"]}
    assert variables["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert "WORKPOOL_CONFIG" in variables
    binding = of_kind(found, "RoleBinding")
    assert binding["roleRef"]["name"] == of_kind(found, "Role")["metadata"]["name"]
    assert [each["name"] for each in binding["subjects"]] == [
        pod_of(deployment)["serviceAccountName"]
    ]


def test_role_of_the_deletion_cost_may_only_patch_pods() -> None:
    readme = (ROOT / "plugins/kubernetes/README.md").read_text()
    [example] = re.findall(r"```yaml\n(apiVersion: rbac.*?)```", readme, re.DOTALL)
    assert yaml.safe_load(example) == of_kind(files(), "Role")
    assert of_kind(files(), "Role")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}
    ]


def test_policy_of_the_deletion_cost_is_for_the_service_account_of_the_workers() -> None:
    policy = of_kind(files(), "ValidatingAdmissionPolicy")
    account = pod_of(of_kind(files(), "Deployment"))["serviceAccountName"]
    [condition] = policy["spec"]["matchConditions"]
    assert condition["expression"].endswith(f"':{account}'")
    binding = of_kind(files(), "ValidatingAdmissionPolicyBinding")
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]


# Values that follow from the settings.


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The settings of the manifests, with a token that exists."""
    text = (KUBERNETES / "common/workpool.toml").read_text()
    (tmp_path / "token").write_text("a token")
    path = tmp_path / "workpool.toml"
    path.write_text(text.replace("/run/secrets/workpool/token", str(tmp_path / "token")))
    return Settings(config=path)


WORKERS = pytest.mark.parametrize("kind", ["Deployment", "ScaledJob"])


@WORKERS
def test_grace_period_of_a_pod_fits_the_drain(settings: Settings, kind: str) -> None:
    assert settings.drain_timeout is not None
    grace = pod_of(of_kind(files(), kind))["terminationGracePeriodSeconds"]
    assert grace >= settings.drain_timeout + 30


@WORKERS
def test_frozen_process_is_killed_before_its_leases_lapse(settings: Settings, kind: str) -> None:
    probe = container_of(of_kind(files(), kind))["livenessProbe"]
    failing = probe["failureThreshold"] * probe["periodSeconds"] + probe["timeoutSeconds"]
    left = settings.lease_ttl - settings.lease_ttl / RENEW_PART - lease_margin(settings.lease_ttl)
    assert failing + probe["terminationGracePeriodSeconds"] < left


@WORKERS
def test_start_of_plugins_may_take_ten_minutes(kind: str) -> None:
    """The liveness probe begins after the startup probe, so it can be strict."""
    probe = container_of(of_kind(files(), kind))["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 600


@WORKERS
def test_probes_and_scrapes_reach_the_port_of_the_settings(settings: Settings, kind: str) -> None:
    address = settings.metrics_address
    assert address is not None
    assert not address.host  # the default is loopback, which no probe reaches
    container = container_of(of_kind(files(), kind))
    [port] = container["ports"]
    assert port["containerPort"] == address.port
    paths = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    for name, path in paths.items():
        assert container[name]["httpGet"] == {"path": path, "port": port["name"]}
    [endpoint] = of_kind(files(), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]
    [ingress] = of_kind(files(), "NetworkPolicy")["spec"]["ingress"]
    assert ingress["ports"] == [{"port": port["name"]}]


@WORKERS
def test_variables_of_a_container_are_settings_without_secrets(kind: str) -> None:
    for variable in container_of(of_kind(files(), kind))["env"]:
        name = variable["name"].removeprefix("WORKPOOL_").lower()
        assert name in {*(each.name for each in fields(Settings)), "config"}
        assert "secretKeyRef" not in variable.get("valueFrom", {})


def test_credential_of_the_settings_is_the_mounted_file() -> None:
    path = Path(
        tomllib.loads((KUBERNETES / "common/workpool.toml").read_text())["workpool"]["token_file"]
    )
    mounts = container_of(of_kind(files(), "Deployment"))["volumeMounts"]
    [mount] = [each for each in mounts if each["name"] == "token"]
    assert str(path.parent) == mount["mountPath"]
    [target] = of_kind(files(), "TriggerAuthentication")["spec"]["secretTargetRef"]
    assert (target["name"], target["key"]) == ("workpool-token", path.name)


def test_pods_of_jobs_differ_from_those_of_the_deployment_in_their_limits_only() -> None:
    deployment, job = (pod_of(of_kind(files(), kind)) for kind in ("Deployment", "ScaledJob"))
    assert job.pop("restartPolicy") == "Never"
    [worker], [once] = deployment["containers"], job["containers"]
    more = {each["name"]: each["value"] for each in once["env"] if each not in worker["env"]}
    assert more == {
        "WORKPOOL_CONCURRENCY": "1",
        "WORKPOOL_EXIT_AFTER_SESSIONS": "1",
        "WORKPOOL_EXIT_AFTER_IDLE": "60",
    }
    once["env"] = worker["env"]
    assert job == deployment


def test_query_of_the_autoscaler_names_metrics_of_the_worker(settings: Settings) -> None:
    [trigger] = of_kind(files(), "ScaledObject")["spec"]["triggers"]
    names = set(re.findall(r"workpool_(\w+)", trigger["metadata"]["query"]))
    assert names == {"slots", "remote_queue_items"}
    assert names <= {each.name for each in DEFINITIONS}
    assert float(trigger["metadata"]["threshold"]) <= settings.concurrency


async def test_trigger_of_the_jobs_reads_the_depth_of_the_queue() -> None:
    """From the embedded control plane, as KEDA's `metrics-api` does."""
    [trigger] = of_kind(files(), "ScaledJob")["spec"]["triggers"]
    wanted = trigger["metadata"]
    async with ControlPlane() as plane, aiohttp.ClientSession() as http:
        plane.enqueue(count=3)
        [path] = re.findall(r"/environments/.*", wanted["url"])
        url = plane.base_url + path.replace("env_CHANGE_ME", plane.environments[0])
        assert wanted["authMode"] == "bearer"
        headers = {"Authorization": f"Bearer {plane.token}"}
        async with http.get(url, headers=headers) as answer:
            assert (await answer.json())[wanted["valueLocation"]] == 3
    assert wanted["url"].partition("/environments/")[0].endswith("/api/v1/cloud")
    assert plane.base_url.endswith("/api/v1/cloud")


def test_update_of_the_manifests_ends_no_job_and_no_worker_too_early() -> None:
    job, deployment = of_kind(files(), "ScaledJob"), of_kind(files(), "Deployment")
    assert job["spec"]["rollout"]["strategy"] == "gradual"
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
