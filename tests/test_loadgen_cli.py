"""The command from end to end, against the null server: what it writes, what it says, and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from serverlesslora_loadgen.cli.main import main
from serverlesslora_loadgen.cli.running import INVALID, MISSED, PASSED, without_secrets
from serverlesslora_loadgen.null_server import null_server
from serverlesslora_loadgen.result import read_result, schema
from serverlesslora_loadgen.trace import digest, read_trace
from tests.server import ROOT

MODELS = ("base", "one", "two", "three")
# Two cores are shared with other tests, so whether this client kept its times is not what is tested here.
ENDED = (PASSED, MISSED, INVALID)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with null_server(ttft_ms=5, tpot_ms=1, models=MODELS) as address:
        yield address


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl.gz"
    made = ["--adapters", "3", "--rate", "20", "--duration", "2s", "--lengths", "fixed:12/4", "-o", str(path)]
    assert main(["generate", *made]) == 0
    return path


def test_a_run_leaves_everything_behind(
    url: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    asked = ["run", "--url", f"{url}/v1", "--trace", str(trace), "--map", "served", "-o", str(out), "--speedup", "2"]
    code = main([*asked, "--slo", "errors=0", "--note", "gpu=none", "--timer", "idle=60s", "--instance-gb", "1.5"])
    assert code in ENDED
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "requests.csv",
        "result.json",
        "summary.md",
        "trace.jsonl.gz",
    ]
    result = read_result(out / "result.json")
    jsonschema.validate(json.loads((out / "result.json").read_text()), schema())
    assert result.whole.counts.sent == result.whole.counts.ok == 40
    assert result.setup.trace.sha256 == digest(read_trace(out / "trace.jsonl.gz"))
    assert result.setup.timers == {"idle": {"raw": 60.0, "effective": 30.0}}
    assert result.setup.server["gpu"] == "none"
    assert result.money is not None and [cost.name for cost in result.money.baselines]
    assert "40 requests" in capsys.readouterr().out
    assert code == (INVALID if not result.verdict.valid else PASSED)


def test_an_objective_that_is_missed_sets_the_exit_code(url: str, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = ["run", "--url", url, "--trace", str(trace), "--map", "served", "-o", str(out), "--no-html"]
    assert main([*asked, "--slo", "ttft=1ms:p50", "--json"]) in (MISSED, INVALID)
    result = read_result(out / "result.json")
    assert not result.verdict.passed and result.setup.limits.ttft_s == 0.001
    assert result.whole.attainment.value == 0.0


def test_answers_are_held_to_golden_ones(url: str, trace: Path, tmp_path: Path) -> None:
    golden, out = tmp_path / "golden.jsonl", tmp_path / "run"
    what = ["--url", url, "--trace", str(trace), "--map", "served", "--seed", "3"]
    assert main(["golden", *what, "--per-adapter", "0", "-o", str(golden)]) == 0
    assert main(["run", *what, "--verify", str(golden), "-o", str(out), "--no-html"]) in (PASSED, INVALID)
    assert read_result(out / "result.json").setup.verified
    lines = [json.loads(line) for line in golden.read_text().splitlines()]
    golden.write_text("".join(json.dumps({**line, "text": "something else"}) + "\n" for line in lines))
    assert main(["run", *what, "--verify", str(golden), "-o", str(out), "--no-html"]) in (MISSED, INVALID)
    assert read_result(out / "result.json").whole.counts.failures == {"wrong-answer": 40}


def test_a_closed_loop_and_a_sweep_say_that_they_are(url: str, trace: Path, tmp_path: Path) -> None:
    what = ["--url", url, "--trace", str(trace), "--map", "served", "--no-html"]
    assert main(["run", *what, "--closed", "4", "-o", str(tmp_path / "closed")]) in ENDED
    closed = read_result(tmp_path / "closed" / "result.json")
    assert closed.mode == "closed" and "closed loop" in closed.title
    searched = ["sweep", *what, "--limit", "ttft=5s", "--max-trials", "2", "-o", str(tmp_path / "sweep")]
    assert main(searched) in ENDED
    swept = read_result(tmp_path / "sweep" / "result.json")
    assert swept.mode == "sweep" and [round(point.speedup, 3) for point in swept.knee][-1:] in ([1.0], [2.0])


def test_two_runs_are_compared(url: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        main(["run", "--url", url, "--trace", str(trace), "--map", "served", "-o", str(tmp_path / name), "--no-html"])
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["report", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report.html").stat().st_size > 1 << 20


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--url", "http://127.0.0.1:9", "--trace", "TRACE"], "cannot ask http://127.0.0.1:9/v1/models"),
        (["run", "--url", "URL", "--trace", "TRACE"], "the trace asks for adapter-00"),
        (["run", "--url", "URL", "--trace", "nowhere.jsonl"], "cannot read the trace nowhere.jsonl"),
        (["run", "--url", "URL", "--trace", "TRACE", "--map", "served", "--slo", "ttft=1s"], "which percentile"),
        (["sweep", "--url", "URL", "--trace", "TRACE", "--map", "served"], "give --limit"),
        (["run", "--url", "URL", "--trace", "TRACE", "--map", "served", "-o", "/proc/x"], "cannot write results"),
        (["inspect", "nowhere.jsonl"], "cannot read the trace"),
        (["compare", "nowhere", "nowhere"], "cannot read"),
        (["generate", "-o", "x.jsonl"], "give --adapters, --rate, --duration"),
    ],
)
def test_what_is_wrong_is_one_line(
    url: str, trace: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"URL": url, "TRACE": str(trace)}.get(word, word) for word in arguments]
    assert main(words) == 1
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error and error.startswith(f"serverlesslora-loadgen {arguments[0]}: ")


def test_keys_are_not_written_down(url: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["run", "--url", url, "--trace", str(trace), "--map", "served", "--no-html", "-o", str(tmp_path / "run")]
    argv += ["--api-key", "sk-very-secret", "--header", "x-token=also-secret"]
    monkeypatch.setattr(sys, "argv", ["loadgen", *argv])
    assert main(argv) in ENDED
    for path in (tmp_path / "run").iterdir():
        assert b"secret" not in path.read_bytes(), path
    assert without_secrets(["x", "--api-key=a", "--header", "b=c", "--url", "d"])[1:] == [
        "--api-key=…",
        "--header",
        "…",
        "--url",
        "d",
    ]


def test_the_published_schema_is_the_one_results_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    published = ROOT / "loadgen" / "serverlesslora_loadgen" / "result.schema.json"
    assert published.read_text() == capsys.readouterr().out, "write it anew: serverlesslora-loadgen schema > FILE"


def test_help_helps() -> None:
    roots = os.pathsep.join(str(ROOT / each) for each in (".", "loadgen"))
    done = subprocess.run(
        [sys.executable, "-m", "serverlesslora_loadgen", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": roots},
        timeout=60,
    )
    assert done.returncode == 0
    for word in ("generate", "import", "inspect", "run", "sweep", "calibrate", "null-server", "golden", "compare"):
        assert word in done.stdout
    assert "exit codes" in done.stdout
