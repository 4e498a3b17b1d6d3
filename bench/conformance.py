"""Everything foreign that judges the API, as one command that prints the tally.

    pip install --group conformance && python bench/conformance.py [--kit FOLDER] [--skip lm-eval]

1. The numbered checks A01 to A58, as tests against the application with a fake backend and against a real server.
2. Clients: openai, litellm (two ways), langchain, instructor (three modes), openai for Node.js.
3. lm-eval's log-likelihoods through us and through transformers with PEFT.
4. schemathesis, all phases, against the real server: over our own /openapi.json and, with `--kit`, over the text part
   of OpenAI's document.
5. With `--kit FOLDER`: its `t_clients.py` and `t.mjs`, unchanged, against a server with the models they expect.

Check A59 is the second part (and the fifth where there is a kit). Exit status 0 when nothing failed and nothing that
was asked for was left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import report

if TYPE_CHECKING:
    from tests.schema_fuzz import Tally

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CHECKS = 59
NODE_CLIENT = "openai@6"
KIT_TIMEOUT_S = 300
EXAMPLES = 25  # of every operation and phase
FUZZED_CONTEXT = 256  # tokens: made-up requests ask for very long answers

Outcomes = Counter[str]  # by outcome: passed, failed, skipped


def pytest(*paths: str, **environment: str) -> dict[str, str]:
    """Outcome by test; one that ran with several parameters has an entry for each."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out}", *paths]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, text=True, capture_output=True)
        if not out.exists():
            raise SystemExit(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = ElementTree.parse(out).iter("testcase")
        found = {f"{case.get('classname')}::{case.get('name')}": outcome_of(case) for case in cases}
    if "failed" in found.values():
        print(done.stdout[-6000:], file=sys.stderr)
    return found


def outcome_of(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"


def checks() -> dict[int, str]:
    """Worst outcome by number."""
    worst: dict[int, str] = {}
    ran = pytest("tests/test_conformance.py", "tests/test_conformance_operation.py")
    for name, outcome in ran.items():
        if found := re.search(r"::test_a(\d\d)_", name):
            number = int(found[1])
            worst[number] = max(worst.get(number, ""), outcome, key=("", "passed", "skipped", "failed").index)
    return worst


@contextlib.contextmanager
def node_modules() -> Iterator[str | None]:
    """A folder with the openai client for Node.js; None where there is no npm or no registry."""
    with tempfile.TemporaryDirectory() as folder:
        npm = shutil.which("npm")
        if npm is None:
            yield None
            return
        command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, NODE_CLIENT]
        done = subprocess.run(command, capture_output=True, text=True)
        yield str(Path(folder) / "node_modules") if done.returncode == 0 else None


def clients(modules: str | None) -> dict[str, str]:
    environment = {} if modules is None else {"SERVERLESSLORA_NODE_MODULES": modules}
    return pytest("tests/test_clients.py", **environment)


def kit_clients(kit: Path, modules: str | None) -> dict[str, str]:
    """The kit's scripts as they are; they ask for `base`, `lora-a`, and `busy`, which is never free."""
    from serverlesslora.demo import adapter_paths, backbone_path
    from tests.live import live

    outcomes: dict[str, str] = {}
    with live(f"base={backbone_path()}", "--dtype", "float32") as server:
        for name, adapter, more in (
            ("lora-a", ROOT / "tests" / "data" / "person", {}),
            ("busy", adapter_paths()["upper"], {"max_concurrency": 0}),
        ):
            answer = server.deploy(name, adapter, **more)
            assert answer.status_code == 201, answer.text
        environment = os.environ | {"BASE_URL": f"{server.url}/v1"}
        for script, program in (("t_clients.py", sys.executable), ("t.mjs", shutil.which("node"))):
            if program is None or (script.endswith(".mjs") and modules is None):
                outcomes[script] = "skipped"
                continue
            with tempfile.TemporaryDirectory() as folder:
                shutil.copy(kit / script, folder)
                if modules is not None:
                    (Path(folder) / "node_modules").symlink_to(modules)
                done = subprocess.run(
                    [program, script],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=KIT_TIMEOUT_S,
                )
            is_right = done.returncode == 0 and "NO ERR" not in done.stdout
            outcomes[script] = "passed" if is_right else "failed"
            if not is_right:
                print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
    return outcomes


def fuzzing(kit: Path | None) -> dict[str, Tally]:
    """Schemathesis against the real server: all phases, over our document and over the kit's."""
    from tests.schema_fuzz import fuzz
    from tests.server import serving

    found: dict[str, Tally] = {}
    models = ("upper", "reverse", "demo")
    with serving("--demo", "--max-model-len", str(FUZZED_CONTEXT)) as url:
        ours = json.loads(urllib.request.urlopen(f"{url}/openapi.json", timeout=30).read())
        found["our document"] = fuzz(ours, url, models, max_examples=EXAMPLES)
        if kit is not None:
            theirs = json.loads((kit / "openai_text_subset.json").read_text())
            found["OpenAI's document"] = fuzz(theirs, f"{url}/v1", models, max_examples=EXAMPLES)
    for tally in found.values():
        if not tally.passed:
            print(tally.output[-12000:], file=sys.stderr)
    return found


def tally(outcomes: dict[Any, str]) -> dict[str, int]:
    return dict(Counter(outcomes.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, help="folder with t_clients.py, t.mjs and openai_text_subset.json")
    parser.add_argument("--skip", action="append", default=[], choices=["lm-eval", "schemathesis", "node"])
    arguments = parser.parse_args()
    numbered = checks()
    parts: dict[str, dict[Any, str]] = {}
    with contextlib.nullcontext(None) if "node" in arguments.skip else node_modules() as modules:
        parts["clients"] = clients(modules)
        if arguments.kit is not None:
            parts["kit"] = kit_clients(arguments.kit.resolve(), modules)
    judged = [outcome for part in parts.values() for outcome in part.values()]
    numbered[CHECKS] = "passed" if set(judged) == {"passed"} else "failed" if "failed" in judged else "skipped"
    fuzzed: dict[str, Tally] = {}
    if "lm-eval" not in arguments.skip:
        parts["lm_eval"] = pytest("tests/test_lm_eval.py")
    if "schemathesis" not in arguments.skip:
        fuzzed = fuzzing(arguments.kit and arguments.kit.resolve())
        parts["schemathesis"] = {name: "passed" if tally.passed else "failed" for name, tally in fuzzed.items()}
    passed = sum(outcome == "passed" for outcome in numbered.values())
    report(
        "conformance",
        checks=f"{passed}/{CHECKS}",
        not_passed={
            f"A{n:02d}": numbered.get(n, "missing") for n in range(1, CHECKS + 1) if numbered.get(n) != "passed"
        },
        **{name: tally(part) for name, part in parts.items()},
        fuzzed={name: {"cases": each.cases, "failures": each.failures} for name, each in fuzzed.items()},
        not_passed_elsewhere={
            name: [str(test) for test, outcome in part.items() if outcome != "passed"] for name, part in parts.items()
        },
    )
    everything = [*numbered.values(), *(outcome for part in parts.values() for outcome in part.values())]
    sys.exit(0 if set(everything) == {"passed"} and len(numbered) == CHECKS else 1)


if __name__ == "__main__":
    main()
