"""What is shipped: the image's recipe, the wheel in it, the manifests around it, and a run of all of it."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.server import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    pytest.importorskip("kubernetes_validate")
    return script("check_manifests")


# --- Dockerfile ---


def instructions() -> list[tuple[str, str]]:
    """Dockerfile instructions in order, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", "\n\0")
    joined = re.sub(r"\n\0", " ", text)
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def last(word: str) -> str:
    return [rest for each, rest in instructions() if each == word][-1]


def final_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(number for number, (word, _) in enumerate(found) if word == "FROM") :]


def test_the_image_runs_as_a_numbered_user_without_rights() -> None:
    uid, _, gid = next(rest for word, rest in final_stage() if word == "USER").partition(":")
    assert int(uid) > 999 and int(gid) > 999  # a name cannot be checked by runAsNonRoot


def test_sigterm_reaches_the_server_and_nothing_else_is_in_between() -> None:
    entrypoint, command = json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))  # the exec form is JSON
    assert entrypoint == ["/opt/serverlesslora/bin/serverlesslora"] and command == ["serve"]
    assert last("STOPSIGNAL") == "SIGTERM"


def test_the_health_check_is_our_own_command_in_exec_form() -> None:
    assert json.loads(last("HEALTHCHECK").partition("CMD ")[2]) == [
        "/opt/serverlesslora/bin/serverlesslora",
        "healthcheck",
    ]


def test_the_final_stage_copies_from_stages_and_installs_nothing() -> None:
    stage = final_stage()
    assert not [rest for word, rest in stage if word == "RUN"]
    copies = [rest for word, rest in stage if word == "COPY"]
    assert all("--from=" in rest or rest.startswith("deploy/server.toml ") for rest in copies)


def test_the_environment_is_one_the_server_understands() -> None:
    from serverlesslora.config import build_config, read_toml
    from serverlesslora.environment import settings_in

    environment = dict(pair.split("=", 1) for word, rest in final_stage() if word == "ENV" for pair in rest.split())
    config = build_config(read_toml(str(ROOT / "deploy" / "server.toml")), settings_in(environment))
    assert (config.host, config.port, config.state_dir) == ("0.0.0.0", 8000, last("VOLUME"))
    assert last("EXPOSE") == str(config.port)
    written = {environment[name] for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    assert all(path.startswith((config.state_dir, "/tmp/")) for path in written)


def test_torch_is_the_version_of_the_makefile() -> None:
    pinned = re.search(r"torch==([0-9.]+)", (ROOT / "Makefile").read_text())
    assert pinned and ("ARG", f"TORCH={pinned[1]}") in instructions()


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "scripts/container.sh", "deploy"])
def test_no_registry_proxy_or_secret_is_written_down(name: str) -> None:
    paths = [ROOT / name] if (ROOT / name).is_file() else [p for p in (ROOT / name).rglob("*") if p.is_file()]
    for path in paths:
        text = path.read_text()
        hosts = set(re.findall(r"https?://([^\s/\"':$]+)", text))
        assert hosts <= {"prometheus", "127.0.0.1"}, path  # the second: inside of the composition
        assert not re.search(r"(?i)(index-url[ =]\S*/|_proxy=|password|api[_-]?key\s*[=:])", text), path


def test_the_build_sees_only_what_the_wheel_is_made_of() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / each).exists() for each in allowed)
    sources = {s for word, rest in instructions() if word == "COPY" and "--from" not in rest for s in rest.split()[:-1]}
    assert {source.removeprefix("./") for source in sources} == allowed


# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel that hatchling makes of what the build sees."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_has_everything_the_server_reads(wheel: set[str]) -> None:
    packages = ["serverlesslora", "serverlesslora_ipc", "serverlesslora_kernels", "serverlesslora_loadgen"]
    assert {f"{package}/__init__.py" for package in packages} <= wheel
    assert {f"{package}/py.typed" for package in packages[:3]} <= wheel
    assert "serverlesslora/metering/prices.toml" in wheel
    for folder, suffix in (("ipc", "py"), ("kernels", "c"), ("kernels", "h"), ("loadgen", "py")):
        for path in (ROOT / folder).rglob(f"*.{suffix}"):
            assert str(path.relative_to(ROOT / folder)) in wheel
    data = [p for p in (ROOT / "serverlesslora").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".so")]
    assert {str(path.relative_to(ROOT)) for path in data} <= wheel  # demo, prices, the live page, device profiles
    assert any(name.startswith("serverlesslora/demo/assets/adapters/") for name in wheel)


def test_the_wheel_shadows_nobody(wheel: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        *("serverlesslora", "serverlesslora_ipc", "serverlesslora_kernels", "serverlesslora_loadgen")
    }


# --- manifests ---


def test_the_manifests_are_right(checks: ModuleType) -> None:
    assert checks.main() == 0


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_kustomize_renders_what_the_checks_looked_at(checks: ModuleType, overlay: str) -> None:
    import yaml  # type: ignore[import-untyped]

    folder = checks.KUSTOMIZE / "overlays" / overlay
    text = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    theirs = list(yaml.safe_load_all(re.sub(r"(serverlesslora-config)-[a-z0-9]{10}\b", r"\1", text)))

    def key(each: dict[str, Any]) -> str:
        return str(each["kind"])

    assert sorted(theirs, key=key) == sorted(checks.render(folder), key=key)


def pod_spec(objects: list[dict[str, Any]]) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == "StatefulSet"]
    spec: dict[str, Any] = found["spec"]["template"]["spec"]
    return spec


def named(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


Breaking = Callable[[list[dict[str, Any]]], Any]
BREAKINGS: dict[str, tuple[Breaking, str]] = {
    "grace": (lambda o: pod_spec(o).update(terminationGracePeriodSeconds=60), "may take 80 s"),
    "selector": (lambda o: named(o, "Service")["spec"]["selector"].update(app="x"), "Service serverlesslora selects"),
    "port": (lambda o: named(o, "Service")["spec"]["ports"][0].update(targetPort="web"), "names the port 'web'"),
    "tag": (lambda o: pod_spec(o)["containers"][0].update(image="a/serverlesslora:latest"), "stays the same"),
    "no tag": (lambda o: pod_spec(o)["containers"][0].update(image="host:5000/serverlesslora"), "stays the same"),
    "resources": (lambda o: pod_spec(o)["containers"][0]["resources"].pop("limits"), "a limit for memory"),
    "probe": (
        lambda o: pod_spec(o)["containers"][0]["readinessProbe"]["httpGet"].update(path="/health"),
        "asks /health",
    ),
    "root": (lambda o: pod_spec(o)["securityContext"].pop("runAsNonRoot"), "never as root"),
    "writable": (lambda o: pod_spec(o)["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"), "read-only"),
    "volume's owner": (lambda o: pod_spec(o)["securityContext"].pop("fsGroup"), "fsGroup 10001"),
    "no scratch": (lambda o: pod_spec(o)["containers"][0]["volumeMounts"].pop(), "nothing is mounted at /tmp"),
    "config": (lambda o: pod_spec(o)["volumes"][0]["configMap"].update(name="other"), "which is not there"),
}


@pytest.mark.parametrize("name", BREAKINGS)
def test_what_is_wrong_with_a_manifest_is_found(checks: ModuleType, name: str) -> None:
    objects = checks.render(checks.KUSTOMIZE / "overlays" / "cpu")
    assert checks.problems(objects) == []
    breaking, sentence = BREAKINGS[name]
    breaking(objects)
    assert sentence in "\n".join(checks.problems(objects))


def test_the_schema_finds_unknown_fields_and_wrong_types(checks: ModuleType) -> None:
    service = named(checks.render(checks.KUSTOMIZE / "base"), "Service")
    service["spec"]["ports"][0]["port"] = "80"
    assert "Service serverlesslora: " in "".join(checks.schema_problems([service]))
    service["spec"]["ports"][0] |= {"port": 80, "protokoll": "TCP"}
    assert "protokoll" in "".join(checks.schema_problems([service]))


def test_an_unknown_setting_in_the_config_map_is_refused(checks: ModuleType) -> None:
    from serverlesslora.errors import ConfigError

    objects = checks.render(checks.KUSTOMIZE / "overlays" / "cpu")
    named(objects, "ConfigMap")["data"]["server.toml"] += "drain_timeout = 3\n"
    with pytest.raises(ConfigError, match="drain_timeout"):
        checks.problems(objects)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"read_only": False}, "read_only"),
        ({"stop_grace_period": "30s"}, "stop_grace_period is 30 s"),
        ({"ports": ["8000:8000"]}, "open to every address"),
        ({"image": "serverlesslora"}, "stays the same"),
        ({"secrets": ["other"]}, "secrets has no other"),
        ({"user": "0:0"}, "must run as 10001"),
        ({"security_opt": []}, "no-new-privileges"),
        ({"tmpfs": []}, "nothing is mounted at /tmp"),
        ({"volumes": ["./nowhere:/x:ro"]}, "./nowhere is not there"),
        ({"configs": ["written"]}, "must be a file"),
    ],
)
def test_what_is_wrong_with_the_composition_is_found(checks: ModuleType, change: dict[str, Any], sentence: str) -> None:
    [compose] = checks.load(ROOT / "compose.yaml")
    config = checks.settings_of((ROOT / "deploy" / "server.toml").read_text())
    assert checks.compose_problems(compose, config) == []
    changed = copy.deepcopy(compose)
    changed["configs"]["written"] = {"content": "here"}
    changed["services"]["server"].update(change)
    assert sentence in "\n".join(checks.compose_problems(changed, config))


def test_the_dashboard_finds_the_data_source_that_is_provisioned(checks: ModuleType) -> None:
    [dashboard] = checks.load(ROOT / "dashboards" / "serverlesslora.json")
    [provisioned] = checks.load(ROOT / "deploy" / "monitoring" / "datasource.yaml")
    [source] = provisioned["datasources"]
    [variable] = [v for v in dashboard["templating"]["list"] if v["type"] == "datasource"]
    assert variable["query"] == source["type"] and source["isDefault"]
    used = set(re.findall(r'"uid": "([^"]+)"', json.dumps(dashboard["panels"])))
    assert used <= {f"${{{variable['name']}}}", source["uid"]}
    [compose] = checks.load(ROOT / "compose.yaml")
    [scrape] = checks.load(ROOT / "deploy" / "monitoring" / "prometheus.yml")
    [targets] = [each["targets"] for each in scrape["scrape_configs"][0]["static_configs"]]
    aliases = [compose["services"][name]["networks"]["default"]["aliases"] for name in ("server", "gpu")]
    assert targets == ["server:8000"] and aliases == [["server"], ["server"]]


# --- what is installed ---


def test_the_image_gets_versions_that_the_package_asks_for() -> None:
    versions = script("image_versions")
    lines = [line for line in (ROOT / "deploy/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert lines == sorted(lines) and not [name for name in pinned if name.startswith(versions.OWN)]
    optional = versions.tomllib.loads(versions.PYPROJECT.read_text())["project"]["optional-dependencies"]
    without = {versions.canonicalize_name(versions.Requirement(each).name) for each in optional["gcs"]} - {"fsspec"}
    for requirement in versions.asked_for():
        name = versions.canonicalize_name(requirement.name)
        if not name.startswith(versions.OWN) and name not in without:
            assert requirement.specifier.contains(pinned[name]), requirement


def test_what_make_installs_for_these_tests_is_named(checks: ModuleType) -> None:
    import tomllib

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    test = {re.split(r"[<>=;\[ ]", each)[0] for each in groups["test"] if isinstance(each, str)}
    assert {"hatchling", "kubernetes-validate", "pyyaml", "jsonschema"} <= test
    assert {"include-group": "test"} in groups["dev"] and "--group dev" in (ROOT / "Makefile").read_text()


def test_cached_files_do_not_keep_a_backbone_out_of_a_container(tmp_path: Path) -> None:
    from serverlesslora.backbone.loader import available_bytes

    mib = 1 << 20
    files = {
        "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n",
        "sys/fs/cgroup/memory.max": f"{4096 * mib}\n",
        "sys/fs/cgroup/memory.current": f"{3000 * mib}\n",
        "sys/fs/cgroup/memory.stat": f"anon {500 * mib}\ninactive_file {2400 * mib}\nactive_file {100 * mib}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == (4096 - 3000 + 2400) * mib
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 32 << 30


# --- all of it ---


def test_the_script_says_what_it_needs() -> None:
    helped = subprocess.run([ROOT / "scripts/container.sh", "--help"], capture_output=True, text=True, check=True)
    assert "--variant" in helped.stdout
    wrong = subprocess.run(
        [ROOT / "scripts/container.sh", "--variant", "tpu"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1 and "cpu or cuda, not tpu" in wrong.stderr
    nothing = subprocess.run([ROOT / "scripts/container.sh", "--reuse"], capture_output=True, text=True, check=False)
    assert nothing.returncode == 1 and "--work" in nothing.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("buildah"), reason="needs root, buildah and debootstrap")
def test_the_image_is_built_and_answers(tmp_path: Path) -> None:
    ran = subprocess.run(
        [ROOT / "scripts/container.sh", "--json", str(tmp_path / "result.json")], stdout=subprocess.PIPE, check=False
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert [check for check in result["checks"] if not check["passed"]] == [] and ran.returncode == 0
