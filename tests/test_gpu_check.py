"""The GPU check without a GPU: its correctness sections on an emulated device, and what it does when one goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import msgspec
import pytest

from bench.gpu import linear, needs, sections
from bench.gpu.children import steady
from bench.gpu.orchestrator import SectionProcess
from bench.gpu.record import Recorder, SectionResult, Setting
from bench.gpu.sections import SECTIONS, Section, choose, deadline_s, turns
from serverlesslora_kernels.cuda.linear import LinearChoice, Measured

ROOT = Path(__file__).resolve().parents[1]


def check(out: Path, *arguments: str, **environment: str) -> tuple[int, dict[str, SectionResult], str]:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu_check.py", "--device", "emulated", "--out", out, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    document = json.loads((out / "gpu-emulated.json").read_text())
    assert document["setup"]["versions"]["torch"]
    results = msgspec.convert(document["sections"], list[SectionResult])
    return done.returncode, {result.name: result for result in results}, done.stdout + done.stderr


def test_everything_correct_on_an_emulated_device(tmp_path: Path) -> None:
    status, results, output = check(tmp_path, "--budget-s", "250")
    failures = [(name, check.name, check.detail) for name, r in results.items() for check in r.checks if not check.ok]
    assert not failures, output
    assert status == 0, output
    assert set(results) == {section.name for section in SECTIONS if section.is_correctness}
    for name, result in results.items():
        assert result.ok is True, (name, result.reason)
        assert result.checks, name
        assert not result.numbers, "an emulated device measures nothing"
    scrubbed = [each.name for each in results["driver"].checks if each.name.startswith("scrubbed")]
    assert len(scrubbed) == 3, "the search finds what is there, covers enough, and nothing after the kill"


def test_what_is_missing_is_said_at_once_and_how_to_get_it(tmp_path: Path) -> None:
    hidden = tmp_path / "sitecustomize.py"  # runs before anything of ours
    hidden.write_text(
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name in ('msgspec', 'xxhash') else found(name, package)\n"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu_check.py", "--device", "emulated", "--out", tmp_path],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("not installed here: msgspec, xxhash; run pip install 'msgspec>=")
    assert "PYTHONPATH" in done.stderr


def test_nothing_of_the_gateway_is_needed() -> None:
    """A machine that only runs the check has no HTTP server installed."""
    code = (
        "import importlib, pathlib, sys\n"
        "for name in ('starlette', 'uvicorn', 'httptools', 'uvloop', 'prometheus_client'):\n"
        "    sys.modules[name] = None\n"
        "for path in pathlib.Path('bench/gpu').glob('*.py'):\n"
        "    importlib.import_module('bench.gpu.' + path.stem)\n"
        "for name in ('backbone.device_host', 'launcher.zygote', 'launcher.device', 'worker.main'):\n"
        "    importlib.import_module('serverlesslora.' + name)\n"
    )
    folders = os.pathsep.join(str(ROOT / folder) for folder in ("", "ipc", "kernels", "loadgen"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": folders, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_needed_is_what_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {*project["dependencies"], *(each.split(";")[0] for each in project["optional-dependencies"]["cuda"])}
    assert set((needs.PACKAGES | needs.ON_A_GPU).values()) - {"tqdm"} <= declared


def test_a_device_that_lets_workers_write_fails_the_check(tmp_path: Path) -> None:
    status, results, output = check(tmp_path, "--only", "driver", SERVERLESSLORA_EMULATED_REFUSES="read-only")
    failed = {each.name for each in results["driver"].checks if not each.ok}
    assert failed == {"workers cannot write: shared by descriptor, mapped read-only"}, output
    assert status == 1
    assert results["driver"].ok is False


@pytest.fixture
def section() -> Section:
    return Section("broken", 5, 1, "nothing")


def run_command(section: Section, code: str, scratch: Path, allowed_s: float) -> SectionResult:
    process = SectionProcess(section, [sys.executable, "-c", code], scratch)
    process.start(scratch, dict(os.environ))
    return process.result(time.monotonic() + allowed_s, allowed_s)


def test_what_a_section_found_before_it_crashed_is_kept(section: Section, tmp_path: Path) -> None:
    found = {"name": "broken", "ok": True, "checks": [{"name": "first", "ok": True}]}
    code = (
        f"import os, signal; open({str(tmp_path / 'broken.json')!r}, 'w').write({json.dumps(found)!r});"
        "print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    result = run_command(section, code, tmp_path, 30)
    assert result.ok is False
    assert result.reason.startswith("killed by SIGSEGV")
    assert [each.name for each in result.checks] == ["first"]
    assert "last words" in result.tail


def test_a_section_that_hangs_is_ended_with_its_children(section: Section, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    process = SectionProcess(section, [sys.executable, "-c", code], tmp_path)
    process.start(tmp_path, dict(os.environ))
    end = time.monotonic() + 30
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    result = process.result(time.monotonic(), 0.0)
    assert (result.ok, result.reason) == (False, "it hung and was ended; it had 0 s")
    child = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def recorder(tmp_path: Path, *, kind: str = "cuda", seconds: float = 10.0) -> Recorder:
    setting = Setting(kind, time.monotonic() + seconds, tmp_path, {"copy_gb_s": 4000.0})  # type: ignore[arg-type]
    return Recorder("some", tmp_path / "some.json", setting)


def test_numbers_know_their_floor_and_bar(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    floor = record.setting.bytes_us(4e9)
    assert floor == pytest.approx(1000.0)
    record.number("time", 1500.0, "us", floor=floor, bar=1400.0)
    record.number("rate", 3.0, "x", bar=1.0, higher_is_better=True)
    record.number("plain", 1.0, "us")
    time_, rate, plain = record.result.numbers
    assert (time_.ratio, time_.met) == (1.5, False)
    assert (rate.met, plain.met, plain.ratio) == (True, None, None)
    assert record.result.ok is True, "a missed bar is no mistake"
    recorded = msgspec.json.decode((tmp_path / "some.json").read_bytes(), type=SectionResult)
    assert recorded.numbers == record.result.numbers


def test_not_a_number_passes_nothing(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    assert record.within("fine", 1e-3, 1e-2)
    assert not record.within("not a number", float("nan"), 1e-2)
    assert record.result.ok is False


def test_a_part_that_raises_fails_alone_and_one_without_time_is_said(tmp_path: Path) -> None:
    record = recorder(tmp_path, seconds=1.0)

    def broken() -> None:
        raise RuntimeError("an illegal address")

    assert not record.part("broken", broken)
    assert record.part("works", lambda: None)
    assert not record.part("long", lambda: None, needs_s=60.0)
    details = {each.name: each.detail for each in record.result.checks}
    assert details["broken"] == "RuntimeError: an illegal address"
    assert record.result.left_out == ["long"]


def test_the_table_of_products_is_written_as_it_is_read(tmp_path: Path) -> None:
    path = linear.table_path(tmp_path / "gpu-some.json")
    one, two = (Measured(rows, 8, 16, 2.0, 1.0) for rows in (1, 2))
    linear.write_table(path, [LinearChoice((one,), device="some"), LinearChoice((two,), device="some")])
    assert path.name == "gpu-some-linear.json"
    assert msgspec.json.decode(path.read_bytes(), type=LinearChoice) == LinearChoice((one, two), device="some")


def test_memory_that_still_comes_back_is_waited_for() -> None:
    readings = iter([5, 6, 6, 7])
    last = [0]

    def measure() -> int:
        last[0] = next(readings, last[0])
        return last[0]

    assert steady(measure, quiet_s=0.1) == 7


def test_choosing_sections() -> None:
    names = [each.name for each in choose(["kernels", "load"], without_gpu=False)]
    assert names == ["kernels_bfloat16", "kernels_float16", "kernels_float32", "limits", "load"], "floors come along"
    assert "limits" not in [each.name for each in choose(["sgmv"], without_gpu=True)]
    with pytest.raises(SystemExit, match="no section nothing"):
        choose(["nothing"], without_gpu=True)


def test_correctness_runs_before_anything_is_timed_and_nothing_beside_what_is() -> None:
    planned = turns(choose([], without_gpu=False))
    assert [each for turn in planned for each in turn] == list(SECTIONS)
    assert planned[0] == [sections.find("driver")]
    together = planned[1]
    assert {"parity", "kernels_bfloat16", "compile_8b"} <= {each.name for each in together}
    assert all(len(turn) == 1 for turn in planned if turn is not together)
    assert [turn[0].name for turn in planned][2] == "limits"


def test_a_deadline_leaves_the_later_ones_what_they_need() -> None:
    first, second = Section("a", 100, 20, ""), Section("b", 50, 30, "")
    assert deadline_s([first], 470, [[second]]) == 100
    assert deadline_s([first], 90, [[second]]) == 60
    assert deadline_s([first], 40, [[second]]) == 20, "its own need comes before that of later ones"
    assert deadline_s([second], 20, []) == 20
    assert deadline_s([second], 5, []) == 0
    assert deadline_s([first, second], 470, []) == 100


def test_all_sections_fit_the_budget() -> None:
    assert sum(max(each.min_s for each in turn) for turn in turns(SECTIONS)) < 300
