"""Compiles the Triton programs for devices that need not be there: `python -m serverlesslora_kernels.cuda.compile_all`.

Every topic says how it launches its programs (`compile_cases`). Alignment is what the just-in-time compiler would find
for whole buffers and round sizes: without it loads are narrow and pipelines lose their shared memory, so neither would
be the ones that run. By default a choice of cases that takes seconds; `--all` leaves none out.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from serverlesslora_kernels.cuda.recorded import CompileCase

TOPICS = ("sgmv", "attention", "fused", "linear", "sampling")
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_VECTOR = r"(?:v4\.[busf]32|v2\.[busf]64)"
_WIDE_LOAD = re.compile(rf"ld\.global[\w.:]*\.{_VECTOR}\b|cp\.async\.c[ag]\.shared\.global[^;]*\b(?:0x10|16)\b")
_NARROW_LOAD = re.compile(r"ld\.global(?:\.[\w:]+)*?\.[bu](?:8|16)\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)")


class Compiled(msgspec.Struct, frozen=True):
    topic: str
    program: str
    sm: int
    types: str  # of the pointers, in order
    num_warps: int
    shared_bytes: int = 0
    wide_loads: int = 0  # of 16 bytes, from global memory
    narrow_loads: int = 0  # of one or two bytes
    registers: int | None = None
    spilled_bytes: int | None = None  # stack and local memory per thread
    error: str = ""


class Job(NamedTuple):
    topic: str
    case: CompileCase
    sm: int


def collect(sms: Sequence[int], *, everything: bool) -> list[Job]:
    jobs = []
    for topic in TOPICS:
        module = importlib.import_module(f"serverlesslora_kernels.cuda.{topic}")
        # A topic may do with torch's operators alone.
        cases = module.compile_cases() if hasattr(module, "compile_cases") else []
        jobs += [Job(topic, case, sm) for case in (cases if everything else choose(cases)) for sm in sms]
    return jobs


def choose(cases: Sequence[CompileCase]) -> list[CompileCase]:
    """bfloat16: of each program and set of switches the largest; besides one case of each program, float32 if any."""
    chosen: dict[object, CompileCase] = {}
    for case in sorted(cases, key=_rank):
        types = _types(case)
        key: tuple[object, ...] = (case.program.__name__,)
        if "*bf16" in types:
            switches = tuple((name, value) for name, value in case.constexprs.items() if isinstance(value, bool))
            key += (types, switches, case.num_warps, case.num_stages)
        chosen.setdefault(key, case)
    return list(chosen.values())


def _rank(case: CompileCase) -> tuple[bool, int]:
    return "*fp16" in _types(case), -math.prod(max(1, n) for n in case.constexprs.values() if isinstance(n, int))


def _types(case: CompileCase) -> str:
    return " ".join(kind for kind in case.signature.values() if kind.startswith("*"))


def compile_job(job: Job) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    case, sm = job.case, job.sm
    about: dict[str, Any] = {
        "topic": job.topic,
        "program": case.program.__name__,
        "sm": sm,
        "types": _types(case),
        "num_warps": case.num_warps,
    }
    source = ASTSource(case.program, case.signature, case.constexprs, _alignment(case))
    try:
        kernel = compile(
            source,
            target=GPUTarget("cuda", sm, 32),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )
    except Exception as error:  # whatever the compiler stumbles over is the answer
        return Compiled(**about, error=f"{type(error).__name__}: {error}")
    shared = kernel.metadata.shared
    registers, spilled = _resources(kernel.asm["cubin"])
    return Compiled(
        **about,
        shared_bytes=shared,
        wide_loads=len(_WIDE_LOAD.findall(kernel.asm["ptx"])),
        narrow_loads=len(_NARROW_LOAD.findall(kernel.asm["ptx"])),
        registers=registers,
        spilled_bytes=spilled,
        error=f"{shared} bytes of shared memory, sm_{sm} has {SHARED_BYTES[sm]}" if shared > SHARED_BYTES[sm] else "",
    )


def _alignment(case: CompileCase) -> dict[tuple[int], list[list[object]]]:
    """Pointers and integers divisible by 16, unless the program asked not to be compiled for such facts."""
    return {
        (param.num,): [["tt.divisibility", 16]]
        for param in case.program.params
        if case.signature[param.name].startswith("*")
        or (case.signature[param.name] in ("i32", "i64") and not param.do_not_specialize)
    }


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers per thread and bytes of them in memory, where Triton brought its tool along."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = _RESOURCES.search(done.stdout)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)


@contextmanager
def _compiled(jobs: Sequence[Job], processes: int) -> Iterator[Iterator[Compiled]]:
    if processes == 1:
        yield map(compile_job, jobs)
        return
    # Forked: programs and their modules are already there, and no thread is.
    with multiprocessing.get_context("fork").Pool(processes, _inherit, (jobs,)) as pool:
        yield pool.imap_unordered(_compile_at, range(len(jobs)))


_inherited: Sequence[Job] = ()


def _inherit(jobs: Sequence[Job]) -> None:
    global _inherited
    _inherited = jobs


def _compile_at(index: int) -> Compiled:
    return compile_job(_inherited[index])


def _table(results: Sequence[Compiled]) -> Table:
    table = Table(
        "program", "types", "sm", "warps", "shared", "registers", "spilled", "16-byte loads", "narrow loads", ""
    )
    for one in results:
        table.add_row(
            f"{one.topic}.{one.program}",
            one.types.replace("*", ""),
            str(one.sm),
            str(one.num_warps),
            f"{one.shared_bytes / 1024:.1f} KiB",
            "?" if one.registers is None else str(one.registers),
            "?" if one.spilled_bytes is None else str(one.spilled_bytes),
            str(one.wide_loads),
            str(one.narrow_loads),
            one.error and "failed",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_all", description=__doc__)
    parser.add_argument("--sm", type=int, nargs="+", choices=sorted(SHARED_BYTES), default=[80, 90])
    parser.add_argument("--all", action="store_true", help="every case instead of a choice")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compilers side by side")
    parser.add_argument("--json", action="store_true", help="results as one JSON array")
    options = parser.parse_args(arguments)
    jobs = collect(options.sm, everything=options.all)
    errors = Console(stderr=True)
    results = []
    # The bar's thread starts after the processes were forked.
    with _compiled(jobs, options.jobs) as done, Progress(console=errors, disable=not errors.is_terminal) as progress:
        task = progress.add_task("compiling", total=len(jobs))
        for result in done:
            results.append(result)
            progress.advance(task)
    results.sort(key=lambda one: (TOPICS.index(one.topic), one.program, one.types, one.sm, one.num_warps))
    if options.json:
        print(msgspec.json.encode(results).decode())
    else:
        Console().print(_table(results))
    failed = [one for one in results if one.error]
    for one in failed:
        errors.print(f"{one.topic}.{one.program} ({one.types}) for sm_{one.sm}: {one.error}", markup=False)
    return 1 if failed else 0


def _without_interpreter() -> None:
    """Triton decides when a program is imported whether to compile it at all: too late to change here."""
    if os.environ.pop("TRITON_INTERPRET", None) is not None:
        os.execv(sys.executable, [sys.executable, "-m", "serverlesslora_kernels.cuda.compile_all", *sys.argv[1:]])


if __name__ == "__main__":
    _without_interpreter()
    sys.exit(main())
