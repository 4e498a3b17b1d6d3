"""Several backbones in one server, described by a file; and what a server that cannot start says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from serverlesslora.demo import TASKS, adapter_paths, backbone_path
from tests.live import live


def test_two_backbones_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'''
dtype = "float32"

[[backbones]]
name = "one"
model = "{backbone_path()}"

[[backbones]]
name = "two"
model = "{backbone_path()}"
dtype = "bfloat16"

[[functions]]
name = "up"
adapter = "{adapter_paths()["upper"]}"

[[functions]]
name = "back"
adapter = "{adapter_paths()["reverse"]}"
backbone = "two"
''')
    with live("--config", str(file)) as server:
        assert server.answer("one", "hello world") == server.answer("two", "hello world") == "hello world"
        assert server.answer("up", "hello world") == TASKS["upper"]("hello world")
        assert server.answer("back", "hello world") == TASKS["reverse"]("hello world")
        state = server.state()
        assert state["domains"] == {"up": "one/function:up", "back": "two/function:back"}
        assert len({backbone["content_digest"] for backbone in state["backbones"]}) == 2
        assert server.deploy("other", adapter_paths()["leet"], backbone="two").status_code == 201
        assert server.deploy("nowhere", adapter_paths()["leet"], backbone="three").status_code == 404


def fails_to_start(*arguments: str) -> str:
    command = [sys.executable, "-m", "serverlesslora", "serve", "--port", "0", "--admin-port", "-1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_backbone_that_is_not_there() -> None:
    assert "/no/such/model" in fails_to_start("/no/such/model")


@pytest.mark.parametrize("kind", ["absent", "nan"])
def test_an_adapter_that_cannot_be_served_is_named(tmp_path: Path, kind: str) -> None:
    broken = tmp_path / "broken"
    says = "no adapter directory"
    if kind == "nan":
        broken.mkdir()
        tensors = load_file(adapter_paths()["upper"] / "adapter_model.safetensors")
        name = sorted(tensors)[0]
        tensors[name][0, 0] = float("nan")
        save_file(tensors, broken / "adapter_model.safetensors")
        config = json.loads((adapter_paths()["upper"] / "adapter_config.json").read_text())
        (broken / "adapter_config.json").write_text(json.dumps(config))
        says = "NaN"
    message = fails_to_start("--demo", "--adapter", f"mine={broken}")
    assert "'mine'" in message
    assert says in message
