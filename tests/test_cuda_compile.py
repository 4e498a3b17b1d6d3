"""Every Triton program compiles for two devices, none is left out, and loads are as wide as they should be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from serverlesslora_kernels.cuda import compile_all
from serverlesslora_kernels.cuda.compile_all import SHARED_BYTES, TOPICS, Compiled, choose
from serverlesslora_kernels.cuda.recorded import CompileCase

pytest.importorskip("triton")

KERNELS = Path(compile_all.__file__).parents[2]
PROGRAMS = Path(compile_all.__file__).parent / "triton_code"
SMS = (80, 90)

# They wait for memory and for nothing else: (program, the narrow loads it may have besides).
MEMORY_BOUND = {
    ("sgmv", "shrink_rows"): 0,
    ("sgmv", "expand_rows"): 1,  # what is in y
    ("attention", "decode_split"): 2,  # sinks
    ("attention", "decode_combine"): 1,
    ("attention", "write_kv"): 0,
    ("linear", "product_of_row"): 0,
    ("linear", "product_of_rows"): 0,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",  # as in a process that runs the other tests: it has to free itself of it
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(KERNELS),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "serverlesslora_kernels.cuda.compile_all", "--json", "--sm", *map(str, SMS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=list[Compiled])


def test_all_compile_within_the_shared_memory(results: list[Compiled]) -> None:
    assert results
    for one in results:
        assert not one.error and 0 <= one.shared_bytes <= SHARED_BYTES[one.sm]
        assert one.registers is None or 0 < one.registers <= 255
    compiled = {(one.topic, one.program, one.sm) for one in results}
    assert compiled == {(topic, program, sm) for topic, program, _ in compiled for sm in SMS}


def test_no_program_is_left_out(results: list[Compiled]) -> None:
    """A program is compiled by itself or as part of one that calls it."""
    found = [program for path in PROGRAMS.glob("*.py") for program in _programs(path)]
    calls = dict(found)
    assert len(calls) == len(found), "names are what programs are told apart by"
    reached: set[str] = set()
    waiting = {(one.topic, one.program) for one in results}
    topics = {topic for topic, _ in waiting}
    assert topics <= set(TOPICS)
    names = {program for _, program in waiting}
    while names:
        reached |= names
        names = {callee for name in names for callee in calls[name]} & calls.keys() - reached
    assert calls.keys() == reached
    # Whoever has a file of programs is a topic; the others do without.
    assert {path.stem for path in PROGRAMS.glob("*.py")} - {"__init__", "precision"} == topics


def test_memory_bound_programs_load_16_bytes(results: list[Compiled]) -> None:
    seen = set()
    for one in results:
        key = one.topic, one.program
        if key in MEMORY_BOUND and "*bf16" in one.types:
            seen.add(key)
            assert one.wide_loads > 0, one
            assert one.narrow_loads <= MEMORY_BOUND[key], one
            assert not one.spilled_bytes, one
    assert seen == MEMORY_BOUND.keys()


def _programs(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Functions under @triton.jit, and the names that occur in them."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list):
            yield (
                node.name,
                {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)},
            )


class _Program:
    def __init__(self, name: str) -> None:
        self.__name__ = name


def _case(name: str, kind: str, warps: int = 4, **constexprs: int) -> CompileCase:
    return CompileCase(_Program(name), {"x": kind, "n": "i32"}, constexprs, warps, 3)


def test_the_choice_has_every_program_and_the_switches_of_bfloat16() -> None:
    large = _case("a", "*bf16", BLOCK=128, ADD=False)
    adding = _case("a", "*bf16", BLOCK=16, ADD=True)
    wide = _case("a", "*bf16", warps=8, BLOCK=16, ADD=False)
    exact, other = _case("a", "*fp32", BLOCK=16), _case("b", "*fp16", BLOCK=32)
    left_out = [_case("a", "*bf16", BLOCK=64, ADD=False), _case("a", "*fp16", BLOCK=512), _case("b", "*fp16", BLOCK=1)]
    chosen = choose([left_out[0], other, exact, *left_out[1:], adding, large, wide])
    assert {id(case) for case in chosen} == {id(case) for case in (large, adding, wide, exact, other)}


def test_a_failure_is_an_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by its exit status and named, whatever the compiler or the device's limits say."""
    job = compile_all.Job("sgmv", _case("broken", "*bf16"), 80)
    failed = Compiled("sgmv", "broken", 80, "*bf16", 4, error="170000 bytes of shared memory, sm_80 has 166912")
    monkeypatch.setattr(compile_all, "collect", lambda sms, everything: [job])
    monkeypatch.setattr(compile_all, "compile_job", lambda job: failed)
    assert compile_all.main(["--sm", "80", "--json", "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    assert msgspec.json.decode(out, type=list[Compiled]) == [failed]
    assert "sgmv.broken (*bf16) for sm_80: 170000 bytes" in " ".join(err.split())
