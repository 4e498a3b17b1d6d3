"""Any OpenAI-compatible server with adapters loaded: mixed arrivals on all it lists, and a report.

    python experiments/foreign.py --url http://127.0.0.1:8000 -o run [--trace FILE] [-- more arguments of `run`]

Without --trace a mixed one is made up (a third of the adapters Predictable, a third Normal, a third Bursty), for as
many adapters as the server lists. Everything after `--` goes to `serverlesslora-loadgen run` as it is, such as
`--prompt text --natural-end` for servers that know nothing of token ids or ignore_eos.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from serverlesslora_loadgen.cli.arguments import adapters_of, target
from serverlesslora_loadgen.cli.main import main as loadgen
from serverlesslora_loadgen.cli.main import make_parser
from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.units import parse_seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--trace", type=Path, help="default: made up")
    parser.add_argument("--rate", type=float, default=1.0, metavar="RPS", help="of what is made up, all adapters [1]")
    parser.add_argument("--duration", type=parse_seconds, default=300.0, metavar="TIME", help="of the same [5m]")
    parser.add_argument("--lengths", default="lognormal:mean=256,sigma=0.8/mean=64,sigma=0.6", help="of the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", metavar="ARGUMENT", help="of `serverlesslora-loadgen run`, after --")
    parsed = parser.parse_args(arguments)
    made_up = parsed.out / "made-up.jsonl.gz"
    trace = parsed.trace or made_up
    run = ["run", "--url", parsed.url, "--trace", str(trace), "--map", "served", "-o", str(parsed.out), *parsed.more]
    asked = target(make_parser().parse_args(run))  # what is wrong with `more` is said before anything is made up
    parsed.out.mkdir(parents=True, exist_ok=True)
    try:
        if parsed.trace is None:
            adapters = adapters_of(asked.url, asked.headers)
            made = ["--adapters", str(len(adapters)), "--rate", str(parsed.rate), "--duration", f"{parsed.duration}s"]
            # Three classes need three adapters at least.
            made += ["--classes", "mixed"] if len(adapters) >= 3 else ["--arrivals", "gamma:cv=2"]
            made += ["--lengths", parsed.lengths, "--seed", str(parsed.seed), "-o", str(made_up)]
            if status := loadgen(["generate", *made]):
                return status
    except LoadgenError as error:
        print(f"foreign: {error}", file=sys.stderr)
        return 1
    return loadgen(run)


if __name__ == "__main__":
    sys.exit(main())
