"""Traces that others have published, made into ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from serverlesslora_loadgen.errors import TraceError
from serverlesslora_loadgen.sources.functions import import_invocations, import_minutes
from serverlesslora_loadgen.sources.logs import import_azure_llm, import_burstgpt, import_jsonl
from serverlesslora_loadgen.sources.options import Imported, ImportOptions, Progress
from serverlesslora_loadgen.sources.servegen import import_servegen

__all__ = ["SOURCES", "ImportOptions", "Imported", "Progress", "import_trace"]

SOURCES: Mapping[str, Callable[[Path, ImportOptions, Progress | None], Imported]] = MappingProxyType(
    {
        "mooncake": import_jsonl,
        "jsonl": import_jsonl,
        "azure-llm": import_azure_llm,
        "azure-functions": import_minutes,
        "azure-functions-2021": import_invocations,
        "burstgpt": import_burstgpt,
        "servegen": import_servegen,
    }
)


def import_trace(kind: str, path: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """`kind` is one of SOURCES. Raises TraceError for a file that cannot be read as one, WorkloadError for options that
    cannot be met."""
    importer = SOURCES.get(kind)
    if importer is None:
        raise TraceError(f"{kind!r} is no source of traces; there are {', '.join(SOURCES)}")
    return importer(path, options, progress)
