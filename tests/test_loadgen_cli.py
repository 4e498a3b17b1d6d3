"""The command from end to end, against the null server: what it writes, what it says, and how it exits."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from experiments import foreign
from serverlesslora_loadgen.classes import CLASSES
from serverlesslora_loadgen.cli.arguments import login
from serverlesslora_loadgen.cli.main import main, make_parser
from serverlesslora_loadgen.cli.running import INVALID, MISSED, PASSED, limits_of, settings_of
from serverlesslora_loadgen.cli.workloads import class_names
from serverlesslora_loadgen.environment import commit_of
from serverlesslora_loadgen.errors import LoadgenError, TargetError, WorkloadError
from serverlesslora_loadgen.null_server import null_server
from serverlesslora_loadgen.output import write_outputs
from serverlesslora_loadgen.privacy import without_secrets, without_userinfo
from serverlesslora_loadgen.result import Limits, read_result, schema
from serverlesslora_loadgen.run import Models, Served, check_models
from serverlesslora_loadgen.trace import TraceRequest, digest, read_trace, write_trace
from serverlesslora_loadgen.units import parse_factor, parse_seconds
from tests.loadgen_samples import sample
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


def test_answers_are_held_to_golden_ones(
    url: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden, out = tmp_path / "golden.jsonl", tmp_path / "run"
    what = ["--url", url, "--trace", str(trace), "--map", "served", "--seed", "3"]
    assert main(["golden", *what, "--per-adapter", "0", "-o", str(golden)]) == 0
    assert main(["run", *what, "--verify", str(golden), "-o", str(out), "--no-html"]) in (PASSED, INVALID)
    setup = read_result(out / "result.json").setup
    assert setup.verified and setup.verified_requests == 40
    assert "0 wrong answers (40 of 40 checked), 0 failed" in (out / "summary.md").read_text()
    lines = [json.loads(line) for line in golden.read_text().splitlines()]
    golden.write_text("".join(json.dumps({**line, "text": "something else"}) + "\n" for line in lines))
    assert main(["run", *what, "--verify", str(golden), "-o", str(out), "--no-html"]) in (MISSED, INVALID)
    assert read_result(out / "result.json").whole.counts.failures == {"wrong-answer": 40}
    golden.write_text("".join(json.dumps(line) + "\n" for line in lines[:6]))
    assert main(["run", *what, "--verify", str(golden), "-o", str(out), "--no-html"]) in (PASSED, INVALID)
    assert read_result(out / "result.json").setup.verified_requests == 6
    capsys.readouterr()
    assert main(["run", *what[:-1], "4", "--verify", str(golden), "--slo", "wrong=0"]) == 1
    assert "none of the golden answers" in capsys.readouterr().err


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
        (["run", "--url", "URL", "--trace", "TRACE", "--map", "served", "--slo", "attainment=99%"], "--limit"),
        (["inspect", "nowhere.jsonl"], "cannot read the trace"),
        (["inspect", "TRACE", "--html", "/nonexistent/x.html"], "cannot write the page /nonexistent/x.html"),
        (["compare", "nowhere", "nowhere"], "cannot read"),
        (["generate", "-o", "x.jsonl"], "give --adapters, --rate, --duration"),
    ],
)
def test_what_is_wrong_is_one_line(
    url: str,
    trace: Path,
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serverlesslora_loadgen.run.MODELS_WAIT_S", 0.0)
    words = [{"URL": url, "TRACE": str(trace)}.get(word, word) for word in arguments]
    assert main(words) == 1
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error and error.startswith(f"serverlesslora-loadgen {arguments[0]}: ")


def test_keys_are_not_written_down(url: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["run", "--url", url, "--trace", str(trace), "--map", "served", "--no-html", "-o", str(tmp_path / "run")]
    argv += ["--api-key", "sk-very-secret", "--header", "x-token=also-secret", "--header=x-other=third-secret"]
    argv += ["--admin-header", "authorization=fourth-secret", "--no-check-models"]
    argv[argv.index(url)] = url.replace("http://", "http://me:fifth-secret@")
    monkeypatch.setattr(sys, "argv", ["loadgen", *argv])
    assert main(argv) in ENDED
    for path in (tmp_path / "run").iterdir():
        assert b"secret" not in path.read_bytes(), path
    result = read_result(tmp_path / "run" / "result.json")
    assert result.setup.target["url"] == url and result.title.endswith(url)
    assert "authorization" in result.setup.target["headers"] and result.whole.counts.ok == 40


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--api-key=a", "--api-key=…"),
        ("--header b=c --url d", "--header … --url d"),
        ("--header=b=c", "--header=…"),
        ("--admin-header k=v --admin-header=k=v", "--admin-header … --admin-header=…"),
        ("--url http://me:pass@host:1/v1", "--url http://host:1/v1"),
        ("--url=https://me:p@ss@host/a@b", "--url=https://host/a@b"),
        ("--header --header --url d", "--header … --url d"),
    ],
)
def test_commands_are_kept_without_what_is_secret(given: str, kept: str) -> None:
    assert " ".join(without_secrets(given.split())) == kept


def test_names_and_passwords_of_addresses_become_headers() -> None:
    assert login("http://me:p%40ss@host:80/v1") == ("http://host:80/v1", {"authorization": "Basic bWU6cEBzcw=="})
    assert login("http://host/a@b") == ("http://host/a@b", {})
    assert (
        without_userinfo("a trace on http://me:pass@host, twice http://u@h") == "a trace on http://host, twice http://h"
    )


@pytest.mark.parametrize("abbreviated", [["--api", "S5"], ["--heade", "x=S6"], ["--admin-head", "x=y"], ["--ur", "x"]])
def test_options_are_spelled_out(abbreviated: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(["run", "--url", "u", "--trace", "t", *abbreviated])
    assert ended.value.code == 2


def asked(*more: str) -> argparse.Namespace:
    return make_parser().parse_args(["run", "--url", "http://127.0.0.1:9", "--trace", "t", *more])


def test_the_admin_api_has_headers_of_its_own() -> None:
    settings = settings_of(asked("--admin", "http://me:x@h:1", "--admin-header", "x-key=a=b", "--api-key", "k"), [])
    assert settings.admin == "http://h:1" and settings.admin_headers == {
        "authorization": "Basic bWU6eA==",
        "x-key": "a=b",
    }
    assert settings.target.headers == {"authorization": "Bearer k"}


def test_of_two_limits_the_loosest_is_what_every_request_has_to_meet() -> None:
    both = ["ttft=500ms:p99", "ttft=100ms:p50", "e2e=3s:p50", "e2e=9s:p99", "errors=0"]
    assert limits_of(None, both) == limits_of(None, both[::-1]) == Limits(ttft_s=0.5, e2e_s=9.0)
    assert limits_of("tpot=1s", both) == Limits(tpot_s=1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        ["run", "--seed", "-1"],
        ["run", "--speedup", "1e400"],
        ["run", "--speedup", "nan"],
        ["run", "--length-scale", "1/0"],
        ["run", "--duration", "1e400s"],
        ["run", "--instance-gb", "nan"],
        ["run", "--instance-gb", "-1"],
        ["run", "--tokens-per-word", "nan", "--prompt", "text"],
        ["run", "--temperature", "inf"],
        ["run", "--processes", "0"],
        ["sweep", "--max-trials", "0"],
        ["sweep", "--precision", "1"],
        ["sweep", "--attainment", "95"],
        ["golden", "-o", "x", "--per-adapter", "-1"],
        ["golden", "-o", "x", "--seed", "-1"],
    ],
    ids=" ".join,
)
def test_what_no_run_can_be_is_wrong_usage(wrong: list[str], trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, *more = wrong
    with pytest.raises(SystemExit) as ended:
        main([command, "--url", "http://127.0.0.1:9", "--trace", str(trace), *more])
    assert (
        ended.value.code == 2
        and f"argument {next(o for o in more[::-1] if o in more and o.startswith('--') and o != '--prompt')}"
        in (capsys.readouterr().err)
    )


def test_factors_and_times() -> None:
    assert [parse_factor(text) for text in ("1/64", " 0.5 ", "3", "1e3")] == [1 / 64, 0.5, 3.0, 1000.0]
    assert parse_seconds("1.5 h") == 5400.0
    for text in ("1/0", "1/", "inf", "1e999999999", "0", "-1", "1/-2", "x"):
        with pytest.raises(LoadgenError, match="factor"):
            parse_factor(text)


def test_results_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(LoadgenError, match=f"cannot write results to {tmp_path}/none"):
        write_outputs(tmp_path / "none", sample(), [], [])


def test_a_trace_without_names_is_asked_of_the_model_that_is_named(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nobody.jsonl"
    write_trace(path, [TraceRequest(10.0 * i, 4, 2, "" if i else "two") for i in range(5)])
    what = ["run", "--url", url, "--trace", str(path), "--no-html", "-o", str(tmp_path / "run")]
    assert main(what) == 1
    assert (
        "4 of 5 requests of the trace name no model; say which one is asked (--model NAME)" in capsys.readouterr().err
    )
    assert main([*what, "--model", "one"]) in ENDED
    assert {each.model for each in read_trace(tmp_path / "run" / "trace.jsonl.gz")} == {"one", "two"}


def test_classes_are_named_alike_everywhere() -> None:
    assert class_names("bursty") == ("Bursty",)
    assert class_names("Predictable, NORMAL") == class_names("predictable;normal") == ("Predictable", "Normal")
    assert class_names("mixed") == CLASSES


def test_a_server_that_lists_its_adapters_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = iter([["base"], ["base", "a"], ["base", "a", "b"]])
    monkeypatch.setattr("serverlesslora_loadgen.run.ASK_EVERY_S", 0.0)
    monkeypatch.setattr("serverlesslora_loadgen.run.get_json", lambda *_, **__: Models(tuple(map(Served, next(lists)))))
    requests = [TraceRequest(0, 1, 1, name) for name in ("a", "b")]
    asyncio.run(check_models(requests, "http://h", {}))
    assert next(lists, None) is None
    monkeypatch.setattr("serverlesslora_loadgen.run.MODELS_WAIT_S", 0.0)
    monkeypatch.setattr("serverlesslora_loadgen.run.get_json", lambda *_, **__: Models((Served("a"),)))
    with pytest.raises(TargetError, match="lists a; the trace asks for b besides"):
        asyncio.run(check_models(requests, "http://h", {}))
    with pytest.raises(WorkloadError, match="1 of 1 requests"):
        asyncio.run(check_models([TraceRequest(0, 1, 1)], "http://h", {}))


def test_only_a_checkout_of_this_very_file_is_told(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.py", tmp_path / "venv" / "theirs.py"
    theirs.parent.mkdir()
    for path in (ours, theirs):
        path.write_text("")
    assert commit_of(ours) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "ours.py"], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert commit_of(ours) and commit_of(theirs) is None


@pytest.mark.parametrize("file", ["docs/loadgen.md", "README.md"])
def test_the_first_example_of_the_documents_works(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (ROOT / file).read_text().replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("serverlesslora-loadgen ")]
    monkeypatch.chdir(tmp_path)
    (generate,) = (words for words in commands if words[0] == "generate")
    assert main(generate) == 0
    for words in commands:
        make_parser().parse_args(words)


def test_a_foreign_server_is_asked_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def adapters(url: str, headers: dict[str, str]) -> list[str]:
        seen.append((url, headers))
        return ["a", "b", "c"]

    def loadgen(words: list[str]) -> int:
        seen.append(words)
        return 0

    monkeypatch.setattr(foreign, "adapters_of", adapters)
    monkeypatch.setattr(foreign, "loadgen", loadgen)
    assert foreign.main(["--url", "http://h/v1", "-o", str(tmp_path), "--", "--api-key", "k", "--header", "x=y"]) == 0
    assert seen[0] == ("http://h", {"authorization": "Bearer k", "x": "y"})
    assert [words[0] for words in seen[1:]] == ["generate", "run"] and seen[2][-4:] == [
        "--api-key",
        "k",
        "--header",
        "x=y",
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
