"""Checks compose.yaml and the Kubernetes objects without a cluster, an engine or a network.

Renders the overlays with the few features of kustomize they use, holds every object to Kubernetes' schema (from the
package kubernetes-validate) and to what a schema cannot know: labels, ports, probes, times to end, resources, rights.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from serverlesslora.config import ServerConfig, build_config, read_toml

ROOT = Path(__file__).resolve().parents[1]
KUSTOMIZE = ROOT / "deploy" / "kustomize"
OVERLAYS = ("cpu", "gpu")
KUBERNETES = "1.31"
STOPPING_S = 10.0  # after the drain: last bytes, workers, ledger
UID = 10001
STATE, SETTINGS, SCRATCH = "/var/lib/serverlesslora", "/etc/serverlesslora", "/tmp"  # as in the image
# Custom resources have no schema here; these are their required fields.
CUSTOM = {"ServiceMonitor": ("selector", "endpoints")}
KNOWN = {"apiVersion", "kind", "resources", "configMapGenerator", "images", "patches", "components"}

Object = dict[str, Any]


class BadManifest(Exception):
    """A kustomization asks for something that `render` does not do; the message names it."""


def render(folder: Path) -> list[Object]:
    """The folder's objects. Generated ConfigMaps keep their plain names: the hash is kustomize's own business."""
    [plan] = load(folder / "kustomization.yaml")
    if unknown := plan.keys() - KNOWN:
        raise BadManifest(f"{folder}: {sorted(unknown)} of kustomize are not rendered here")
    objects: list[Object] = []
    for name in [*plan.get("resources", ()), *plan.get("components", ())]:
        path = folder / name
        objects += render(path) if path.is_dir() else load(path)
    for wanted in plan.get("configMapGenerator", ()):
        data = {Path(name).name: (folder / name).read_text() for name in wanted["files"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": wanted["name"]}, "data": data})
    for image in plan.get("images", ()):
        for container in containers(objects):
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
    for patch in plan.get("patches", ()):
        target = patch["target"]
        [found] = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (target["kind"], target["name"])]
        for [*operations] in load(folder / patch["path"]):
            apply(found, operations)
    return objects


def load(path: Path) -> list[Any]:
    return [copy.deepcopy(each) for each in yaml.safe_load_all(path.read_text()) if each is not None]


def apply(target: Object, operations: list[Object]) -> None:
    """RFC 6902, `add` and `replace`."""
    for operation in operations:
        *parents, last = operation["path"].strip("/").split("/")
        place: Any = target
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        if operation["op"] not in ("add", "replace"):
            raise BadManifest(f"the patch operation {operation['op']!r} is not rendered here")
        if isinstance(place, list):
            place.insert(len(place) if last == "-" else int(last), operation["value"])
        elif operation["op"] == "replace" and last not in place:
            raise BadManifest(f"{operation['path']} is replaced but not there")
        else:
            place[last.replace("~1", "/")] = operation["value"]


def pods(objects: list[Object]) -> list[Object]:
    return [o["spec"]["template"] for o in objects if o["kind"] in ("Deployment", "StatefulSet")]


def containers(objects: list[Object]) -> list[Object]:
    return [container for pod in pods(objects) for container in pod["spec"]["containers"]]


@functools.cache
def routes() -> frozenset[str]:
    """Paths of the application, read from its source: `Route("/health", …)`."""
    package = ROOT / "serverlesslora" / "gateway"
    calls = (node for path in package.glob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return frozenset(
        node.args[0].value
        for node in calls
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Route"
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


def schema_problems(objects: list[Object]) -> Iterator[str]:
    for each in objects:
        name = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] in CUSTOM:
            yield from (f"{name} has no {field}" for field in CUSTOM[each["kind"]] if field not in each["spec"])
            continue
        try:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"


def problems(objects: list[Object]) -> list[str]:
    """What a schema cannot know and is wrong with rendered objects, as sentences."""
    found: list[str] = []
    for pod in pods(objects):
        found += [*_selector_problems(objects, pod), *_pod_problems(pod)]
        [settings] = [o["data"]["server.toml"] for o in objects if o["kind"] == "ConfigMap"]
        found += _time_problems(pod["spec"]["terminationGracePeriodSeconds"], settings_of(settings), "the pod's grace")
    return found


def settings_of(text: str) -> ServerConfig:
    return build_config(tomllib.loads(text))


def _time_problems(grace_s: float, config: ServerConfig, whose: str) -> Iterator[str]:
    needed_s = config.drain_delay_s + config.drain_timeout_s + STOPPING_S
    if grace_s < needed_s:
        yield f"{whose} is {grace_s:g} s, draining and stopping may take {needed_s:g} s"


def _selector_problems(objects: list[Object], pod: Object) -> Iterator[str]:
    labels = pod["metadata"]["labels"].items()
    ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
    for each in objects:
        name, spec = f"{each['kind']} {each['metadata']['name']}", each.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector", {}))
        wanted = selector if each["kind"] == "Service" else selector.get("matchLabels", {})
        if not wanted.items() <= labels:
            yield f"{name} selects {wanted}, the pod has {dict(labels)}"
        rules = [port for rule in spec.get("ingress", ()) for port in rule.get("ports", ())]
        used = [port["targetPort"] for port in spec.get("ports", ())] + [port["port"] for port in rules]
        yield from (
            f"{name} names the port {port!r}, the pod has {sorted(ports)}" for port in used if port not in ports
        )
    names = {o["metadata"]["name"] for o in objects if o["kind"] in ("ConfigMap", "ServiceAccount", "Service")}
    for volume in pod["spec"].get("volumes", ()):
        if "configMap" in volume and volume["configMap"]["name"] not in names:
            yield f"the volume {volume['name']} is of the ConfigMap {volume['configMap']['name']}, which is not there"
    if pod["spec"]["serviceAccountName"] not in names:
        yield f"the service account {pod['spec']['serviceAccountName']} is not there"


def _pod_problems(pod: Object) -> Iterator[str]:
    spec, security = pod["spec"], pod["spec"].get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser") != UID:
        yield f"the pod must run as {UID} and never as root"
    if security.get("fsGroup") != UID:
        yield f"a volume belongs to root; with fsGroup {UID} the server may write to it"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "the pod has no RuntimeDefault system call filter"
    if spec.get("automountServiceAccountToken") is not False:
        yield "the pod gets a service account's token, which it does not need"
    known = routes()
    for container in spec["containers"]:
        name, own = container["name"], container.get("securityContext", {})
        if not own.get("readOnlyRootFilesystem") or own.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: the root file system must be read-only and privileges must not grow"
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{name}: capabilities are not all dropped"
        yield from _image_problems(container["image"], name)
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
            yield f"{name}: resources must have requests for cpu and memory and a limit for memory"
        for probe, path in (("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")):
            asked = container.get(probe, {}).get("httpGet", {}).get("path")
            if asked != path or asked not in known:
                yield f"{name}: {probe} asks {asked}, expected {path}, which must be one of the application's routes"
        paths = {mount["mountPath"] for mount in container.get("volumeMounts", ())}
        yield from (f"{name}: nothing is mounted at {p}" for p in (STATE, SETTINGS, SCRATCH) if p not in paths)
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        if missing := {volume["name"] for volume in spec.get("volumes", ())} - mounted:
            yield f"{name}: the volumes {sorted(missing)} are nowhere mounted"


def _image_problems(image: str, whose: str) -> Iterator[str]:
    tag = re.sub(r"^.*/", "", image).partition(":")[2]
    if not tag or tag == "latest":
        yield f"{whose}: the image {image!r} needs a tag that stays the same, not 'latest'"


def compose_problems(compose: Object, config: ServerConfig) -> list[str]:
    found = [*_compose_schema_problems(compose), *_file_problems(compose)]
    for name, service in compose["services"].items():
        found += _image_problems(service["image"], name)
        if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
            found.append(f"{name}: read_only and cap_drop: [ALL] are missing")
        if "no-new-privileges:true" not in service.get("security_opt", ()):
            found.append(f"{name}: no-new-privileges is missing")
        found += [
            f"{name}: the port {p} is open to every address" for p in service.get("ports", ()) if "127.0.0.1" not in p
        ]
        for kind in ("configs", "secrets", "volumes"):
            given = [v["source"] if isinstance(v, dict) else v.partition(":")[0] for v in service.get(kind, ())]
            named = [v for v in given if re.fullmatch(r"[a-z_]+", v)]
            found += [f"{name}: {kind} has no {v}" for v in named if v not in compose.get(kind, {})]
        if service.get("read_only"):
            found += [
                f"{name}: {kind}: {given} must be a file, engines put nothing else into a read-only service"
                for kind in ("configs", "secrets")
                for given in service.get(kind, ())
                if _is_inline(compose, kind, given)
            ]
        if "build" in service:
            grace_s = float(service["stop_grace_period"].removesuffix("s"))
            found += _time_problems(grace_s, config, f"{name}: stop_grace_period")
            targets = [volume.split(":")[1] for volume in service.get("volumes", ())]
            targets += [each.partition(":")[0] for each in service.get("tmpfs", ())]
            found += [f"{name}: nothing is mounted at {path}" for path in (STATE, SCRATCH) if path not in targets]
            if service.get("user") != f"{UID}:{UID}" or "healthcheck" not in service:
                found.append(f"{name}: it must run as {UID} and have a health check")
    return found


def _is_inline(compose: Object, kind: str, given: Any) -> bool:
    source = given["source"] if isinstance(given, dict) else given
    return "file" not in compose.get(kind, {}).get(source, {"file": "reported as missing"})


def _file_problems(compose: Object) -> Iterator[str]:
    for kind in ("configs", "secrets"):
        for name, each in compose.get(kind, {}).items():
            path = each.get("file", "")
            if path.startswith("./") and not (ROOT / path).is_file():
                yield f"{kind}: the file {path} of {name} is not there"
    for name, service in compose["services"].items():
        for volume in service.get("volumes", ()):
            path = volume.partition(":")[0] if isinstance(volume, str) else volume["source"]
            if path.startswith("./") and not (ROOT / path).exists():
                yield f"{name}: the volume {path} is not there, engines make it an empty folder"


def _compose_schema_problems(compose: Object) -> Iterator[str]:
    """Against the Compose Specification's schema, where the package check-jsonschema brings it."""
    package = importlib.util.find_spec("check_jsonschema")
    if package is None or package.origin is None:
        return
    path = Path(package.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    for error in jsonschema.Draft7Validator(json.loads(path.read_text())).iter_errors(compose):
        yield f"compose.yaml: {'.'.join(map(str, error.path))}: {error.message}"


def main() -> int:
    found: list[str] = []
    monitor = KUSTOMIZE / "components" / "servicemonitor"
    for overlay in OVERLAYS:
        objects = [*render(KUSTOMIZE / "overlays" / overlay), *render(monitor)]
        found += [f"{overlay}: {problem}" for problem in [*schema_problems(objects), *problems(objects)]]
        print(f"{overlay}: {len(objects)} objects")
    [compose] = load(ROOT / "compose.yaml")
    found += compose_problems(compose, build_config(read_toml(str(ROOT / "deploy" / "server.toml"))))
    print(f"compose.yaml: {len(compose['services'])} services")
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
