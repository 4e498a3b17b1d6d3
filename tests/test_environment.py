"""Settings from environment variables: every one of them, between the file and the flags."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serverlesslora.cli.healthcheck import default_url
from serverlesslora.cli.main import make_parser
from serverlesslora.cli.serve import config_from
from serverlesslora.config import ServerConfig, default_state_dir
from serverlesslora.environment import CONFIG_VARIABLE, settings_in, variable_of
from serverlesslora.errors import ConfigError
from serverlesslora.gateway.app import create_app
from tests.backend_fake import FakeBackend
from tests.server import ROOT, running


def config(environment: dict[str, str], *flags: str) -> ServerConfig:
    return config_from(make_parser().parse_args(["serve", *flags]), environment)


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = 1\nmax_queue = 1\nmax_running = 1\n")
    environment = {CONFIG_VARIABLE: str(file), "SERVERLESSLORA_PORT": "2", "SERVERLESSLORA_MAX_QUEUE": "2"}
    found = config(environment, "--port", "3")
    assert (found.port, found.max_queue, found.max_running) == (3, 2, 1)
    other = tmp_path / "other.toml"
    other.write_text("max_running = 7\n")
    assert config(environment, "--config", str(other)).max_running == 7


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("idle_timeout_s", "1.5", 1.5),
        ("prefix_cache", "false", False),
        ("prefix_cache", "1", True),
        ("memory_mb", "4000", 4000),
        ("memory_mb", "", None),
        ("host", "0.0.0.0", "0.0.0.0"),
        ("adapter_roots", "/a:/b", ("/a", "/b")),
        ("log_format", "json", "json"),
        ("port", "tcp://10.0.0.1:8000", 8000),  # Kubernetes, of a service with our name
    ],
)
def test_values(name: str, text: str, value: object) -> None:
    assert getattr(config({variable_of(name): text}), name) == value


def test_every_setting_has_a_variable() -> None:
    fields = [field.name for field in msgspec.structs.fields(ServerConfig)]
    environment = {variable_of(name): "[]" for name in fields}
    assert settings_in(environment).keys() == set(fields)


def test_tables_are_json() -> None:
    found = config(
        {
            "SERVERLESSLORA_BACKBONES": '[{"model": "org/base"}]',
            "SERVERLESSLORA_FUNCTIONS": '[{"name": "f", "adapter": "/x", "tenant": "acme"}]',
        }
    )
    assert found.backbones[0].public_name == "base"  # and no demo
    assert found.functions[0].tenant == "acme"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("PORT", "many", "port"),
        ("FUNCTIONS", "f=/x", "SERVERLESSLORA_FUNCTIONS must be JSON"),
        ("LOG_LEVEL", "all", "log_level"),
    ],
)
def test_what_is_wrong_is_named(name: str, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config({f"SERVERLESSLORA_{name}": text})


def test_commands_beside_the_server_find_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESSLORA_STATE_DIR", "/data")
    assert default_state_dir() == "/data"
    assert config({}).state_dir == "/data"
    assert make_parser().parse_args(["keys", "list"]).state_dir == "/data"


@pytest.fixture
def served() -> Iterator[tuple[Any, str]]:
    app = create_app(FakeBackend())
    with running(app) as url:
        yield app, url


def healthcheck(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    roots = os.pathsep.join(str(ROOT / each) for each in (".", "ipc"))
    return subprocess.run(
        [sys.executable, "-m", "serverlesslora", "healthcheck", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"PYTHONPATH": roots} | environment,
    )


def test_the_health_check(served: tuple[Any, str]) -> None:
    app, url = served
    assert healthcheck("--url", url).returncode == 0
    assert healthcheck("--ready", SERVERLESSLORA_PORT=url.rpartition(":")[2]).returncode == 0
    app.state.gateway.drain()
    not_ready = healthcheck("--ready", "--url", url)
    assert (not_ready.returncode, not_ready.stdout) == (1, "")
    assert "status 503" in not_ready.stderr
    assert healthcheck("--url", f"{url}/ready").returncode == 1
    assert healthcheck("--url", url).returncode == 0


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        (None, None, "http://127.0.0.1:8000"),
        ("0.0.0.0", "9000", "http://127.0.0.1:9000"),
        ("::", "9000", "http://[::1]:9000"),
        ("10.0.0.7", "tcp://10.0.0.1:8000", "http://10.0.0.7:8000"),
        ("", "", "http://127.0.0.1:8000"),
    ],
)
def test_where_the_health_check_asks(host: str | None, port: str | None, url: str) -> None:
    settings = {"SERVERLESSLORA_HOST": host, "SERVERLESSLORA_PORT": port}
    assert default_url({name: value for name, value in settings.items() if value is not None}) == url


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[", "http://127.0.0.1:99999"])
def test_no_server_is_not_healthy(url: str) -> None:
    found = healthcheck("--url", url)
    assert found.returncode == 1
    assert found.stderr.startswith("serverlesslora healthcheck: ")
    assert "Traceback" not in found.stderr


def test_the_health_check_imports_next_to_nothing() -> None:
    code = """
import sys
from serverlesslora.__main__ import main
sys.argv = ["serverlesslora", "healthcheck", "--url", "http://127.0.0.1:1"]
main()
ours = [name for name in sys.modules if name.startswith("serverlesslora.")]
print(len(ours), *{"msgspec", "rich", "starlette", "uvloop"} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == ["3"]  # the command, its package and __main__
