"""What is found of this machine's devices without torch, and what `doctor --device` says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from serverlesslora import devices
from serverlesslora.cli.main import main
from serverlesslora.devices import FALLBACKS, SENTENCES, choose_device, device_nodes
from serverlesslora_ipc.cuda.emulated import REFUSES_VARIABLE
from serverlesslora_ipc.messages import Sharing


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev."""
    monkeypatch.setattr(devices, "_DEV", tmp_path)
    return tmp_path


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(devices, "installed_version", lambda name: versions.get(name.replace("-", "_")))


def test_every_way_of_sharing_has_its_sentence() -> None:
    assert SENTENCES.keys() == set(get_args(Sharing))
    assert all("WRITABLE" in SENTENCES[sharing] for sharing in FALLBACKS)
    assert all("read-only" in SENTENCES[sharing] for sharing in SENTENCES.keys() - FALLBACKS)


def test_only_nodes_of_gpus_count(dev: Path) -> None:
    for name in ("nvidiactl", "nvidia-uvm", "nvidia1", "nvidia0", "null"):
        (dev / name).touch()
    assert device_nodes() == [str(dev / "nvidia0"), str(dev / "nvidia1")]


def test_auto_is_cuda_only_where_everything_is_there(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, cuda_bindings="13", torch="2.11.0+cu130")
    assert choose_device("auto") == ("cpu", "no NVIDIA device node in /dev")
    (dev / "nvidia0").touch()
    assert choose_device("auto").kind == "cuda"
    installed(monkeypatch, torch="2.11.0+cu130")
    assert choose_device("auto").kind == "cpu"
    assert "pip install" in choose_device("auto").reason
    installed(monkeypatch, cuda_bindings="13", torch="2.11.0+cpu")
    assert choose_device("auto").kind == "cpu"
    assert "CPU build" in choose_device("auto").reason
    assert choose_device("cuda").kind == "cuda", "who names a device gets it, or an error from it"


def test_choosing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from serverlesslora.devices import choose_device; choose_device('auto'); "
        "print(sorted({'torch', 'triton', 'cuda', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_doctor_without_a_gpu(dev: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device"]) == 1
    assert "no CUDA device: no NVIDIA device node" in capsys.readouterr().out


def test_doctor_with_a_node_but_no_driver(dev: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dev / "nvidia0").touch()
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver here")
    assert main(["doctor", "--device", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"].startswith("no CUDA device: cuInit: ")


@pytest.mark.parametrize(
    ("refuses", "sharing", "verdict"),
    [
        ("", "vmm", "ready: "),
        ("read-only", "vmm-writable", "usable, with a caveat: "),
        ("fds", "cuda-ipc", "usable, with a caveat: "),
    ],
)
def test_doctor_finds_out_by_trying(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, refuses: str, sharing: Sharing, verdict: str
) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, refuses)
    assert main(["doctor", "--device", "emulated", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sharing"], found["verdict"]) == (sharing, verdict + SENTENCES[sharing])
    assert found["free_bytes"] <= found["total_bytes"]
    assert main(["doctor", "--device", "emulated"]) == 0
    assert SENTENCES[sharing] in capsys.readouterr().out


def test_doctor_wants_to_know_what_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1
    assert "--device" in capsys.readouterr().err
