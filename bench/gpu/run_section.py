"""The process of one section, `python -m bench.gpu.run_section NAME …`; what it finds goes to a file."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

from bench.gpu.record import Recorder, Setting, Skipped
from bench.gpu.sections import find


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--device", required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--deadline-s", type=float, required=True)
    parser.add_argument("--limits", default="{}")
    parser.add_argument("--beside", type=Path, help="the result file of the whole run")
    options = parser.parse_args()
    section = find(options.name)
    deadline = time.monotonic() + options.deadline_s
    limits = json.loads(options.limits)
    setting = Setting(options.device, deadline, options.scratch, limits, section.variant, options.beside)
    recorder = Recorder(options.name, options.result, setting)
    try:
        section.run(recorder)
    except Skipped as skipped:
        recorder.skip(str(skipped))
    except Exception as error:
        traceback.print_exc()
        recorder.check("runs to its end", False, f"{type(error).__name__}: {str(error)[:300]}")
    recorder.finish()
    return 0 if recorder.result.ok is not False else 1


if __name__ == "__main__":
    sys.exit(main())
