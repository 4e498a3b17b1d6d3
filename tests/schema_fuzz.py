"""An OpenAPI document as a test: requests made from its schemas, and answers held to it.

Schemathesis does it, as a command of its own; what is added is a value for `model`, without which every request would
end at an unknown name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# What a server owes to everybody. Not among them: that everything a schema allows is served (one that names a feature
# it lacks, with 400, does as it should) and that everything else is refused (unknown fields are ignored).
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
PHASES = ("examples", "coverage", "fuzzing")  # the second tries every constraint of a schema by itself


class Tally(NamedTuple):
    cases: int
    failures: tuple[str, ...]  # the titles of what was found, each once
    output: str
    passed: bool


def fuzz(
    spec: dict[str, Any],
    url: str,
    models: Iterable[str],
    *,
    max_examples: int = 25,
    seed: int = 1,
    checks: Iterable[str] = CHECKS,
    phases: Iterable[str] = PHASES,
    deadline_s: float = 600.0,
) -> Tally:
    """Asks the server at `url`, which the paths of the document follow."""
    with tempfile.TemporaryDirectory() as scratch:
        document = Path(scratch) / "openapi.json"
        document.write_text(json.dumps(with_models(spec, list(models))))
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", url]
        command += ["--max-examples", str(max_examples), "--seed", str(seed), "--continue-on-failure"]
        command += ["--checks", ",".join(checks), "--phases", ",".join(phases), "--no-color"]
        command += ["--warnings", "off", "--suppress-health-check", "all", "--generation-database", "none"]
        run = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=deadline_s, check=False)
    output = run.stdout + run.stderr
    cases = sum(int(each) for each in re.findall(r"^\s*(\d+) generated", output, re.MULTILINE))
    found = re.findall(r"^- (.+?)\s*$", output, re.MULTILINE)
    return Tally(cases, tuple(dict.fromkeys(found)), output, run.returncode == 0)


def with_models(spec: dict[str, Any], models: list[str]) -> dict[str, Any]:
    """A copy in which every `model` of a request, and every name of one in a path, is one of these."""
    copy: dict[str, Any] = json.loads(json.dumps(spec))
    for name in list(_requested(copy)):
        _enumerate(copy["components"]["schemas"][name], models)
    for methods in copy["paths"].values():
        for operation in methods.values():
            _rename(operation.get("requestBody"), models[0])
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["schema"] = {"type": "string", "enum": models}
    return copy


def _enumerate(schema: Any, models: list[str]) -> None:
    """In place, wherever it has a property called `model`."""
    if isinstance(schema, list):
        for each in schema:
            _enumerate(each, models)
    elif isinstance(schema, dict):
        properties = schema.get("properties")
        if isinstance(properties, dict) and "model" in properties:
            properties["model"] = {"type": "string", "enum": models}
        for each in schema.values():
            _enumerate(each, models)


def _rename(part: Any, model: str) -> None:
    """In examples of requests, in place."""
    if isinstance(part, list):
        for each in part:
            _rename(each, model)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name == "model" and isinstance(value, str):
                part[name] = model
            else:
                _rename(value, model)


def _requested(spec: dict[str, Any]) -> Iterator[str]:
    """The names of the schemas that request bodies consist of."""
    bodies = [op["requestBody"] for methods in spec["paths"].values() for op in methods.values() if "requestBody" in op]
    waiting, seen = [json.dumps(bodies)], set()
    while waiting:
        for name in re.findall(r'"#/components/schemas/([^"]+)"', waiting.pop()):
            if name not in seen:
                seen.add(name)
                waiting.append(json.dumps(spec["components"]["schemas"][name]))
                yield name
