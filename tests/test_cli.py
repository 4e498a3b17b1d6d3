"""The command line against a real server, and the doctor without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverlesslora.cli import doctor
from serverlesslora.cli.main import main
from serverlesslora.demo import ADAPTER_NAMES, TASKS, adapter_paths
from tests.live import Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live("--demo") as running:
        yield running


def run(server: Live, capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> tuple[int, str]:
    code = main([command, *arguments, "--server", server.admin])
    return code, capsys.readouterr().out


def test_deploy_list_remove(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(adapter_paths()["reverse"])
    code, out = run(server, capsys, "deploy", "mine", path, "--tenant", "acme", "--json")
    assert code == 0
    assert json.loads(out)["tenant"] == "acme"
    assert server.answer("mine", "Cold start") == TASKS["reverse"]("Cold start")
    code, out = run(server, capsys, "list", "--json")
    assert {f["name"] for f in json.loads(out)} == {*ADAPTER_NAMES, "mine"}
    code, out = run(server, capsys, "list")
    assert "mine" in out
    assert main(["deploy", "mine", path, "--server", server.admin]) == 1
    assert "already been loaded" in capsys.readouterr().err
    assert run(server, capsys, "deploy", "mine", path, "--replace")[0] == 0
    assert run(server, capsys, "remove", "mine")[0] == 0
    assert server.chat("mine", "x").status_code == 404
    assert main(["remove", "mine", "--server", server.admin]) == 1


def test_top(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("upper", "a")
    code, out = run(server, capsys, "top", "--json")
    assert code == 0
    assert any(worker["domain"].endswith("function:upper") for worker in json.loads(out)["workers"])
    code, out = run(server, capsys, "top", "--once")
    assert "serving" in out


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--server", "http://127.0.0.1:1"]) == 1
    assert "serverlesslora serve" in capsys.readouterr().err


def test_doctor_finds_parity(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(adapter_paths()["mask"]), "--backbone", "demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["served"]
    assert found["differs_from_base"]
    assert found["max_logit_difference"] <= doctor.TOLERANCE


def test_doctor_says_why_an_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_paths()["upper"], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": config["r"] + 1}))
    assert main(["doctor", str(adapter), "--backbone", "demo"]) == 1
    assert "refused" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path)]) == 1
    assert "adapter_config.json is missing" in capsys.readouterr().err
