"""What an evaluation harness reads from us is what it reads from transformers and PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.lm_eval_peer import PAIRS, TEXTS
from tests.server import ROOT, serving

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")


FUNCTIONS = ("reverse", "mask", "demo")


def test_log_likelihoods_are_those_of_transformers() -> None:
    with serving("--demo") as url:
        command = [sys.executable, "-m", "tests.lm_eval_peer", f"{url}/v1", *FUNCTIONS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"function"')]
    assert [(line["function"], line["with_bos"]) for line in lines] == [
        (function, with_bos) for function in FUNCTIONS for with_bos in (False, True)
    ]
    for line in lines:
        assert len(line["ours"]) == len(line["theirs"]) == len(PAIRS) + len(TEXTS)
        for (ours, ours_greedy), (theirs, theirs_greedy) in zip(line["ours"], line["theirs"], strict=True):
            assert ours == pytest.approx(theirs, abs=2e-3, rel=2e-5)
            assert ours_greedy == theirs_greedy
    # An adapter that was left out would agree with nobody's.
    assert abs(lines[0]["ours"][0][0] - lines[2]["ours"][0][0]) > 1
    assert abs(lines[0]["ours"][0][0] - lines[4]["ours"][0][0]) > 1
