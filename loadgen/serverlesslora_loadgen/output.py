"""What a run leaves behind: the trace as it was replayed, every request, the result, and two ways to read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.export import write_csv
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.report.html import write_report
from serverlesslora_loadgen.report.markdown import write_summary
from serverlesslora_loadgen.result import Result, write_result
from serverlesslora_loadgen.trace import TraceRequest, write_trace

RESULT, REQUESTS, SUMMARY, REPORT, TRACE = (
    "result.json",
    "requests.csv",
    "summary.md",
    "report.html",
    "trace.jsonl.gz",
)


def write_outputs(
    folder: Path, result: Result, records: Sequence[Record], requests: Sequence[TraceRequest], *, html: bool = True
) -> None:
    """What cannot be made again first: should drawing fail, the numbers are there. Raises LoadgenError."""
    try:
        write_csv(folder / REQUESTS, records)
        write_result(folder / RESULT, result)
        write_trace(folder / TRACE, requests)
    except OSError as error:
        raise LoadgenError(f"cannot write results to {folder}: {error}") from error
    write_summary(result, folder / SUMMARY)
    if html:
        write_report(result, folder / REPORT)
