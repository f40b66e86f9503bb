"""The Kubernetes manifests are valid, and match each other and the settings of the worker."""

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

import jsonschema
import kubernetes_validate
import pytest
import yaml
from yarl import URL

from workpool import Settings
from workpool.metrics.definitions import DEFINITIONS
from workpool.pool.lease import RENEW_PART
from workpool.scaling import FLEET_NUMBERS
from workpool.settings import lease_margin, parse_listen_address

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "workpool/deploy/kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
AUTOSCALED = ("overlays/autoscaled", "overlays/autoscaled-by-api", "overlays/autoscaled-by-hpa")
OVERLAYS = ("base", "overlays/monitored", *AUTOSCALED, "overlays/job-per-session")
VERSIONS = ("1.30", "1.37")
"""The oldest and the newest Kubernetes that the manifests are validated for."""
KUBECTL = (1, 22)
"""The oldest kubectl whose `kustomize` knows the fields used here."""

Manifest = dict[str, Any]


def parse_manifests(text: str) -> list[Manifest]:
    return [each for each in yaml.safe_load_all(text) if each is not None]


def manifests_in_files() -> list[Manifest]:
    """Return the manifests from all YAML files for Kubernetes, except Kustomize's own files."""
    paths = [
        path
        for path in sorted(KUBERNETES.rglob("*.yaml"))
        if path.name not in {"kustomization.yaml", "namereference.yaml"}
    ]
    return [each for path in paths for each in parse_manifests(path.read_text())]


def manifest_of_kind(found: list[Manifest], kind: str) -> Manifest:
    """Return the manifest of a kind; if there are several, return that of the workers."""
    ones = [each for each in found if each["kind"] == kind]
    if len(ones) > 1:
        ones = [each for each in ones if each["metadata"]["name"] == "workpool"]
    [one] = ones
    return one


def manifest_in_file(path: str) -> Manifest:
    """Return the only manifest of a file."""
    [one] = parse_manifests((KUBERNETES / path).read_text())
    return one


def pod_spec_of_manifest(manifest: Manifest) -> Manifest:
    """Return the spec of the pod template of a Deployment or a ScaledJob."""
    spec = manifest["spec"]
    pod: Manifest = spec.get("jobTargetRef", spec)["template"]["spec"]
    return pod


def worker_container(manifest: Manifest) -> Manifest:
    [container] = pod_spec_of_manifest(manifest)["containers"]
    return dict(container)


@pytest.fixture(scope="module")
def kubectl() -> str:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    words = [program, "version", "--client", "--output=json"]
    version = json.loads(subprocess.check_output(words))["clientVersion"]  # noqa: S603 - our own words
    if (int(version["major"]), int(re.sub(r"\D", "", version["minor"]))) < KUBECTL:
        oldest = ".".join(map(str, KUBECTL))
        pytest.skip(f"kubectl {version['gitVersion']} is older than {oldest}")
    return program


def render_overlay(kubectl: str, folder: Path) -> list[Manifest]:
    done = subprocess.run(  # noqa: S603 - our own words
        [kubectl, "kustomize", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return parse_manifests(done.stdout)


def write_overlay_with_deletion_cost(overlay: str, folder: Path) -> Path:
    """Write an overlay with the deletion-cost component, and return its directory."""
    # The path is relative, because Kustomize rejects absolute paths.
    checkout = os.path.relpath(KUBERNETES, folder)
    kustomization = {
        "resources": [f"{checkout}/{overlay}"],
        "components": [f"{checkout}/components/deletion-cost"],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


@pytest.fixture(params=OVERLAYS)
def rendered_overlay(kubectl: str, request: pytest.FixtureRequest) -> list[Manifest]:
    """Return the manifests that kubectl renders from one overlay."""
    return render_overlay(kubectl, KUBERNETES / request.param)


def find_manifests_of_builtin_kinds(found: list[Manifest]) -> Iterator[Manifest]:
    """Yield the manifests of kinds built into Kubernetes, and the job in each ScaledJob."""
    for each in found:
        if each["kind"] == "ScaledJob":
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": each["metadata"]}
            yield job | {"spec": each["spec"]["jobTargetRef"]}
        elif not schema_path_of_manifest(each).exists():
            yield each


def schema_path_of_manifest(manifest: Manifest) -> Path:
    return SCHEMAS / f"{manifest['kind'].lower()}.json"


def validate_custom_resource(manifest: Manifest) -> None:
    schema = json.loads(schema_path_of_manifest(manifest).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)


def validate_resource_of_builtin_kind(manifest: Manifest, version: str = VERSIONS[-1]) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_overlay_manifests_are_valid_for_kubernetes(
    rendered_overlay: list[Manifest], version: str
) -> None:
    for each in find_manifests_of_builtin_kinds(rendered_overlay):
        validate_resource_of_builtin_kind(each, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_manifest_files_match_schemas_of_kubernetes_version(version: str) -> None:
    """Unlike the check of rendered overlays, this check also runs without kubectl."""
    for each in find_manifests_of_builtin_kinds(manifests_in_files()):
        validate_resource_of_builtin_kind(each, version)


def test_custom_resources_have_no_unknown_fields() -> None:
    custom = [each for each in manifests_in_files() if schema_path_of_manifest(each).exists()]
    assert {each["kind"] for each in custom} == {"PodMonitor", "ScaledJob", "ScaledObject"}
    for each in custom:
        validate_custom_resource(each)


def test_unknown_field_of_a_manifest_is_reported() -> None:
    for each in manifests_in_files():
        wrong = copy.deepcopy(each)
        wrong.get("spec", wrong)["limitOfReplicas"] = 1
        check = (
            validate_custom_resource
            if schema_path_of_manifest(wrong).exists()
            else validate_resource_of_builtin_kind
        )
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


def test_resources_that_an_overlay_refers_to_exist_in_the_overlay(
    rendered_overlay: list[Manifest],
) -> None:
    """The Secret `workpool-token` is no part of the overlay, because the operator creates it."""
    names = {(each["kind"], each["metadata"]["name"]) for each in rendered_overlay}
    for each in rendered_overlay:
        if each["kind"] in {"Deployment", "ScaledJob"}:
            pod = pod_spec_of_manifest(each)
            assert ("ServiceAccount", pod["serviceAccountName"]) in names
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert ("ConfigMap", volumes["settings"]["configMap"]["name"]) in names
            assert volumes["token"]["secret"]["secretName"] == "workpool-token"
            mounted = {mount["name"] for mount in worker_container(each)["volumeMounts"]}
            assert mounted == set(volumes)
        if each["kind"] in {"ScaledObject", "HorizontalPodAutoscaler"}:
            assert ("Deployment", each["spec"]["scaleTargetRef"]["name"]) in names
        for trigger in each.get("spec", {}).get("triggers", ()):
            if "authenticationRef" in trigger:
                assert ("TriggerAuthentication", trigger["authenticationRef"]["name"]) in names


def test_selectors_of_an_overlay_match_its_pods(rendered_overlay: list[Manifest]) -> None:
    pods = {
        each["metadata"]["name"]: each["spec"].get("jobTargetRef", each["spec"])["template"]
        for each in rendered_overlay
        if each["kind"] in {"Deployment", "ScaledJob"}
    }
    seen = set()
    for each in rendered_overlay:
        if each["kind"] in {"NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "Deployment"}:
            selector = each["spec"].get("podSelector", each["spec"].get("selector"))["matchLabels"]
        elif each["kind"] == "Service":
            selector = each["spec"]["selector"]
        else:
            continue
        name = each["metadata"]["name"]
        assert selector.items() <= pods[name]["metadata"]["labels"].items()
        seen.add(name)
    assert seen == set(pods)


def test_documented_kustomization_sets_namespace_image_and_settings(
    kubectl: str, tmp_path: Path
) -> None:
    page = (ROOT / "workpool/docs/operating.md").read_text()
    [example] = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", page, re.DOTALL)
    # The path is relative, because Kustomize rejects absolute paths.
    checkout = os.path.relpath(ROOT, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(example.replace("PATH/TO", checkout))
    (tmp_path / "workpool.toml").write_text('[workpool]\nplugins = ["reports"]\n')
    found = render_overlay(kubectl, tmp_path)
    assert (
        worker_container(manifest_of_kind(found, "Deployment"))["image"]
        == "registry.example/reports:3"
    )
    assert "reports" in manifest_of_kind(found, "ConfigMap")["data"]["workpool.toml"]
    assert {each["metadata"]["namespace"] for each in found} == {"workers"}
    for each in find_manifests_of_builtin_kinds(found):
        validate_resource_of_builtin_kind(each)


@pytest.mark.parametrize("overlay", AUTOSCALED)
def test_autoscaled_deployment_leaves_the_number_of_pods_to_the_autoscaler(
    kubectl: str, overlay: str
) -> None:
    found = render_overlay(kubectl, KUBERNETES / overlay)
    assert "replicas" not in manifest_of_kind(found, "Deployment")["spec"]
    for each in found:
        if each["kind"] == "Deployment" and each["metadata"]["name"] != "workpool":
            assert each["spec"]["replicas"] == 1


def test_overlay_with_deletion_cost_binds_role_and_provides_pod_name_and_token(
    kubectl: str, tmp_path: Path
) -> None:
    found = render_overlay(
        kubectl, write_overlay_with_deletion_cost("overlays/autoscaled", tmp_path)
    )
    for each in find_manifests_of_builtin_kinds(found):
        validate_resource_of_builtin_kind(each)
    deployment = manifest_of_kind(found, "Deployment")
    assert pod_spec_of_manifest(deployment)["automountServiceAccountToken"] is True
    variables = {each["name"]: each for each in worker_container(deployment)["env"]}
    assert variables["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert "WORKPOOL_CONFIG" in variables
    binding = manifest_of_kind(found, "RoleBinding")
    assert binding["roleRef"]["name"] == manifest_of_kind(found, "Role")["metadata"]["name"]
    assert [each["name"] for each in binding["subjects"]] == [
        pod_spec_of_manifest(deployment)["serviceAccountName"]
    ]


def test_deletion_cost_role_may_only_patch_pods() -> None:
    readme = (ROOT / "plugins/kubernetes/README.md").read_text()
    [example] = re.findall(r"```yaml\n(apiVersion: rbac.*?)```", readme, re.DOTALL)
    assert yaml.safe_load(example) == manifest_of_kind(manifests_in_files(), "Role")
    assert manifest_of_kind(manifests_in_files(), "Role")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}
    ]


def test_deletion_cost_policy_applies_to_the_service_account_of_the_workers() -> None:
    policy = manifest_of_kind(manifests_in_files(), "ValidatingAdmissionPolicy")
    account = pod_spec_of_manifest(manifest_of_kind(manifests_in_files(), "Deployment"))[
        "serviceAccountName"
    ]
    [condition] = policy["spec"]["matchConditions"]
    assert condition["expression"].endswith(f"':{account}'")
    binding = manifest_of_kind(manifests_in_files(), "ValidatingAdmissionPolicyBinding")
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]


@pytest.fixture
def worker_settings(tmp_path: Path) -> Settings:
    """Return the worker settings of the manifests, with the path of an existing token file."""
    text = (KUBERNETES / "common/workpool.toml").read_text()
    (tmp_path / "token").write_text("a token")
    path = tmp_path / "workpool.toml"
    path.write_text(text.replace("/run/secrets/workpool/token", str(tmp_path / "token")))
    return Settings(config=path)


WORKERS = pytest.mark.parametrize("kind", ["Deployment", "ScaledJob"])


@WORKERS
def test_termination_grace_period_exceeds_drain_timeout_by_30_seconds(
    worker_settings: Settings, kind: str
) -> None:
    assert worker_settings.drain_timeout is not None
    grace = pod_spec_of_manifest(manifest_of_kind(manifests_in_files(), kind))[
        "terminationGracePeriodSeconds"
    ]
    assert grace >= worker_settings.drain_timeout + 30


@WORKERS
def test_liveness_probe_kills_frozen_worker_before_its_leases_expire(
    worker_settings: Settings, kind: str
) -> None:
    probe = worker_container(manifest_of_kind(manifests_in_files(), kind))["livenessProbe"]
    failing = probe["failureThreshold"] * probe["periodSeconds"] + probe["timeoutSeconds"]
    left = (
        worker_settings.lease_ttl
        - worker_settings.lease_ttl / RENEW_PART
        - lease_margin(worker_settings.lease_ttl)
    )
    assert failing + probe["terminationGracePeriodSeconds"] < left


@WORKERS
def test_startup_probe_gives_plugins_ten_minutes_to_start(kind: str) -> None:
    """The liveness probe can be strict, because it begins only after the startup probe."""
    probe = worker_container(manifest_of_kind(manifests_in_files(), kind))["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 600


@WORKERS
def test_probes_and_scrapes_use_the_metrics_port_of_the_settings(
    worker_settings: Settings, kind: str
) -> None:
    address = worker_settings.metrics_address
    assert address is not None
    # An empty host means all interfaces: probes cannot reach the loopback interface.
    assert not address.host
    container = worker_container(manifest_of_kind(manifests_in_files(), kind))
    [port] = container["ports"]
    assert port["containerPort"] == address.port
    paths = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    for name, path in paths.items():
        assert container[name]["httpGet"] == {"path": path, "port": port["name"]}
    [endpoint] = manifest_of_kind(manifests_in_files(), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]
    [ingress] = manifest_of_kind(manifests_in_files(), "NetworkPolicy")["spec"]["ingress"]
    assert ingress["ports"] == [{"port": port["name"]}]


@WORKERS
def test_container_sets_only_variables_of_settings_and_none_from_a_secret(kind: str) -> None:
    for variable in worker_container(manifest_of_kind(manifests_in_files(), kind))["env"]:
        name = variable["name"].removeprefix("WORKPOOL_").lower()
        assert name in {*(each.name for each in fields(Settings)), "config"}
        assert "secretKeyRef" not in variable.get("valueFrom", {})


def test_token_file_of_the_settings_is_the_mounted_secret() -> None:
    path = Path(
        tomllib.loads((KUBERNETES / "common/workpool.toml").read_text())["workpool"]["token_file"]
    )
    mounts = worker_container(manifest_of_kind(manifests_in_files(), "Deployment"))["volumeMounts"]
    [mount] = [each for each in mounts if each["name"] == "token"]
    assert str(path.parent) == mount["mountPath"]


def test_pods_of_scaled_job_differ_from_pods_of_deployment_only_in_exit_limits() -> None:
    deployment, job = (
        pod_spec_of_manifest(manifest_of_kind(manifests_in_files(), kind))
        for kind in ("Deployment", "ScaledJob")
    )
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


def test_target_value_of_both_autoscalers_equals_concurrency_of_a_worker(
    worker_settings: Settings,
) -> None:
    [trigger] = manifest_in_file("overlays/autoscaled/scaledobject.yaml")["spec"]["triggers"]
    assert float(trigger["metadata"]["threshold"]) == worker_settings.concurrency
    [metric] = manifest_of_kind(manifests_in_files(), "HorizontalPodAutoscaler")["spec"]["metrics"]
    target = metric["external"]["target"]
    assert (target["type"], target["averageValue"]) == (
        "AverageValue",
        str(worker_settings.concurrency),
    )


def read_keda_query() -> str:
    [trigger] = manifest_in_file("overlays/autoscaled/scaledobject.yaml")["spec"]["triggers"]
    query: str = trigger["metadata"]["query"]
    return query


def test_queries_of_both_autoscalers_are_equal_and_name_metrics_of_the_worker() -> None:
    query = read_keda_query()
    names = set(re.findall(r"workpool_(\w+)", query))
    assert names == {"slots", "remote_queue_items", "remote_stats_timestamp_seconds"}
    assert names <= {each.name for each in DEFINITIONS}
    page = (ROOT / "workpool/docs/operating.md").read_text()
    [example] = re.findall(r"```yaml\n(externalRules:.*?)```", page, re.DOTALL)
    [rule] = yaml.safe_load(example)["externalRules"]
    adapted = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'environment_id="env_CHANGE_ME"')
    assert adapted.split() == query.split()
    [metric] = manifest_of_kind(manifests_in_files(), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert rule["name"]["as"] == metric["external"]["metric"]["name"]


def test_autoscaler_query_counts_queued_items_once_although_each_worker_reports_them(
    tmp_path: Path,
) -> None:
    """Three workers report the same queue, and the values that the third reports are out of date.

    Each worker has two busy slots.
    """
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    environment = 'environment_id="env_CHANGE_ME"'
    workers = [("5x20", "0+15x20"), ("5x20", "0+15x20"), ("99x20", "0x20")]
    series = [
        {"series": f'workpool_{name}{{{labels}, instance="w{number}"}}', "values": values}
        for number, (claimable, read_at) in enumerate(workers)
        for name, labels, values in (
            ("slots", f'{environment}, state="busy"', "2x20"),
            ("slots", f'{environment}, state="free"', "6x20"),
            ("remote_queue_items", f'{environment}, state="claimable"', claimable),
            ("remote_queue_items", f'{environment}, state="pending"', "1x20"),
            ("remote_stats_timestamp_seconds", environment, read_at),
        )
    ]
    tests = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": series,
                "promql_expr_test": [
                    {
                        "eval_time": "4m",
                        "expr": read_keda_query(),
                        "exp_samples": [{"labels": "{}", "value": 3 * 2 + 5 + 1}],
                    }
                ],
            }
        ],
    }
    (tmp_path / "query.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(  # noqa: S603 - our own words
        [promtool, "test", "rules", "query.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path",
    ["overlays/autoscaled-by-api/scaledobject.yaml", "overlays/job-per-session/scaledjob.yaml"],
)
def test_keda_trigger_reads_a_number_that_the_scale_service_provides(path: str) -> None:
    [trigger] = manifest_in_file(path)["spec"]["triggers"]
    url = URL(trigger["metadata"]["url"])
    service = manifest_of_kind(manifests_in_files(), "Service")
    [port] = service["spec"]["ports"]
    assert url.host is not None
    assert url.host.split(".")[0] == service["metadata"]["name"]
    assert (url.port, url.path) == (port["port"], "/scale")
    assert trigger["metadata"]["valueLocation"] in FLEET_NUMBERS
    assert "authenticationRef" not in trigger


def test_scale_process_listens_on_the_port_of_service_and_probes() -> None:
    container = worker_container(manifest_in_file("scale/deployment.yaml"))
    command, flag, address = container["args"]
    assert (command, flag) == ("scale", "--metrics-listen")
    [port] = container["ports"]
    listen = parse_listen_address(address)
    assert listen is not None
    assert (listen.host, listen.port) == (None, port["containerPort"])
    [served] = manifest_of_kind(manifests_in_files(), "Service")["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    for name, path in {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}.items():
        assert container[name]["httpGet"] == {"path": path, "port": port["name"]}


def test_keda_scaled_job_has_default_strategy_and_counts_unfinished_items() -> None:
    """KEDA's strategy `default` subtracts the running jobs from the number of unfinished items."""
    spec = manifest_of_kind(manifests_in_files(), "ScaledJob")["spec"]
    [trigger] = spec["triggers"]
    assert spec["scalingStrategy"] == {"strategy": "default"}
    assert trigger["metadata"]["valueLocation"] == "unfinished"
    assert trigger["metadata"]["targetValue"] == "1"


@pytest.mark.parametrize("overlay", ["autoscaled", "autoscaled-by-api"])
def test_autoscaler_without_metrics_keeps_the_number_of_pods(overlay: str) -> None:
    spec = manifest_in_file(f"overlays/{overlay}/scaledobject.yaml")["spec"]
    assert spec["fallback"]["behavior"] == "currentReplicas"


def test_documented_trigger_authentication_is_valid_and_uses_the_scale_token() -> None:
    page = (ROOT / "workpool/docs/operating.md").read_text()
    [example] = re.findall(r"```yaml\n([^`]*?kind: TriggerAuthentication.*?)```", page, re.DOTALL)
    authentication, trigger = parse_manifests(example)
    validate_custom_resource(authentication)
    [target] = authentication["spec"]["secretTargetRef"]
    assert target["parameter"] == "token"
    [wanted] = trigger["triggers"]
    assert wanted["authenticationRef"]["name"] == authentication["metadata"]["name"]
    assert wanted["metadata"]["authMode"] == "bearer"
    assert URL(wanted["metadata"]["url"]).path.startswith("/scale/env_")
    assert wanted["metadata"]["valueLocation"] in FLEET_NUMBERS


def test_rollout_is_gradual_for_jobs_and_makes_no_pod_of_deployment_unavailable() -> None:
    job, deployment = (
        manifest_of_kind(manifests_in_files(), "ScaledJob"),
        manifest_of_kind(manifests_in_files(), "Deployment"),
    )
    assert job["spec"]["rollout"]["strategy"] == "gradual"
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
