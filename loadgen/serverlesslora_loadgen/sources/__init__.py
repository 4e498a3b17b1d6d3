"""Traces that others have published, made into ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from serverlesslora_loadgen.errors import TraceError, WorkloadError
from serverlesslora_loadgen.sources.functions import import_invocations, import_minutes
from serverlesslora_loadgen.sources.logs import import_azure_llm, import_burstgpt, import_jsonl
from serverlesslora_loadgen.sources.options import Imported, ImportOptions, Progress
from serverlesslora_loadgen.sources.servegen import import_servegen

__all__ = ["SOURCES", "ImportOptions", "Imported", "Progress", "import_trace"]

PART = frozenset({"seed", "start_s", "duration_s"})
OF_LOGS = PART | {"model", "jitter_ms"}
OF_CHOICES = PART | {"lengths", "functions", "classes", "popularity_cap", "rate_rps"}

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

USED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "mooncake": OF_LOGS,
        "jsonl": OF_LOGS,
        "azure-llm": OF_LOGS,
        "azure-functions": OF_CHOICES | {"trigger"},
        "azure-functions-2021": OF_CHOICES,
        "burstgpt": OF_LOGS,
        "servegen": OF_CHOICES,
    }
)


def import_trace(kind: str, path: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """`kind` is one of SOURCES. Raises TraceError for a file that cannot be read as one, WorkloadError for options that
    cannot be met, or that this source has no use for: whoever gives one believes that it did something."""
    importer = SOURCES.get(kind)
    if importer is None:
        raise TraceError(f"{kind!r} is no source of traces; there are {', '.join(SOURCES)}")
    default = ImportOptions()
    given = [name for name in options.__struct_fields__ if getattr(options, name) != getattr(default, name)]
    if useless := [f"--{_spelled(name)}" for name in given if name not in USED[kind]]:
        raise WorkloadError(
            f"{kind} has no use for {', '.join(useless)}; leave {'it' if len(useless) == 1 else 'them'} out"
        )
    return importer(path, options, progress)


def _spelled(name: str) -> str:
    """As the command line has it."""
    return name.removesuffix("_rps").removesuffix("_s").replace("_", "-")
