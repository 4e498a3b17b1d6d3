"""Proves on a real GPU what the tests can only emulate: sharing, kernels, the engine, cold starts. One command:

    python bench/gpu_check.py [--only SECTION …] [--budget-s 470] [--device cuda|emulated] [--out bench/results]

Every section runs in a process of its own with a deadline, so that a crash or a hang in one stops no other. The result
file is written after each. The exit code is 0 when every correctness check holds; speed bars count with `--strict`.
With `--device emulated` the correctness sections run on tiny shapes without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# This folder must not be searched: it has a `kernels.py`, and transformers imports a package of that name.
sys.path[:] = [str(ROOT / folder) for folder in ("", "ipc", "kernels", "loadgen")] + [
    path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench"
]

from bench.gpu import needs, sections  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SECTION", help=", ".join(s.name for s in sections.SECTIONS)
    )
    parser.add_argument("--budget-s", type=float, default=470.0, help="all sections together [470]")
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--strict", action="store_true", help="a missed bar fails the run as well")
    options = parser.parse_args()
    if lacking := needs.missing(on_a_gpu=options.device == "cuda"):
        raise SystemExit(needs.sentence(lacking))
    if options.device == "cuda" and not needs.has_compiler():
        print("no C compiler is found, and Triton launches nothing without one: install gcc or set CC", file=sys.stderr)
    chosen = sections.choose(options.only, without_gpu=options.device == "emulated")
    from bench.gpu.orchestrator import Run  # not before all of its packages are known to be there

    run = Run(ROOT, options.device, options.out, budget_s=options.budget_s)
    return run.main_loop(chosen, strict=options.strict)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
