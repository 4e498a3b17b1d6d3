"""What can be wrong with what people give the load generator."""

from __future__ import annotations


class LoadgenError(Exception):
    """Told to the person as one line, without a traceback."""


class TraceError(LoadgenError):
    """A trace, or a file to make one from, that cannot be read."""


class WorkloadError(LoadgenError):
    """A workload that cannot be made, or is not what was asked for."""


class TargetError(LoadgenError):
    """A server that cannot be reached, or does not serve what the trace asks for."""


class ResultError(LoadgenError):
    """A result that cannot be read, or two that cannot be compared."""


class ObjectiveError(LoadgenError):
    """An objective (`--slo`) or a price that cannot be understood."""
