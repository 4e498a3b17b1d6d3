"""Which functions of a source become adapters: by popularity, by class, never by leaving out some of their requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serverlesslora_loadgen.classes import MIN_ARRIVALS
from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.sources.options import ImportOptions


class Candidate(NamedTuple):
    """A function, as it is in the time that is taken."""

    place: int  # among all functions of the source
    requests: int
    class_: str | None  # None: too few requests to say


def choose(candidates: Sequence[Candidate], options: ImportOptions, duration_s: float) -> list[Candidate]:
    """In the order of adapters: by the classes as they are named, within each the most popular first.

    Each class gives an equal part of the functions, spread evenly over its ranks of popularity, and, when a rate is
    asked for, of the rate. Raises WorkloadError when a class has too few.
    """
    groups: list[tuple[str | None, list[Candidate]]] = (
        [(name, [each for each in candidates if each.class_ == name]) for name in options.classes]
        if options.classes
        else [(None, list(candidates))]
    )
    chosen: list[Candidate] = []
    for number, (name, group) in enumerate(groups):
        group.sort(key=lambda each: (-each.requests, each.place))
        wanted = None if options.functions is None else _part(options.functions, len(groups), number)
        if not group or (wanted is not None and wanted > len(group)):
            raise WorkloadError(_too_few(name, wanted, len(group), options))
        goal = None if options.rate_rps is None else options.rate_rps * duration_s / len(groups)
        chosen += fit(group, wanted, goal)
    return chosen


def fit(group: Sequence[Candidate], wanted: int | None, goal: float | None) -> list[Candidate]:
    """`wanted` (None: all) of `group`, which descends, together nearest to `goal` requests (None: does not matter).

    The busiest are passed over one by one: with a later beginning every rank that is taken moves down or stays, so the
    sum never grows, and the beginning to take is found by halving.
    """

    def taken(top: int) -> list[Candidate]:
        return [group[rank] for rank in _ranks(top, len(group), wanted)]

    def total(top: int) -> int:
        return sum(each.requests for each in taken(top))

    if goal is None:
        return taken(0)
    low, high = 0, len(group) - (wanted or 1)  # of the first beginning with a sum of at most the goal
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(middle) <= goal else (middle + 1, high)
    nearest = min((low, max(0, low - 1)), key=lambda top: abs(total(top) - goal))
    return taken(nearest)


def _ranks(top: int, ranks: int, wanted: int | None) -> Sequence[int]:
    """`wanted` ranks from `top` to the last, evenly; of one alone the first."""
    if wanted is None:
        return range(top, ranks)
    if wanted == 1:
        return [top]
    last = ranks - 1
    return [top + (last - top) * step // (wanted - 1) for step in range(wanted)]


def _part(whole: int, parts: int, number: int) -> int:
    """Of a whole that may not divide evenly: the first parts have one more."""
    return whole // parts + (number < whole % parts)


def _too_few(name: str | None, wanted: int | None, there: int, options: ImportOptions) -> str:
    """What to say, and what to do about it."""
    what = f"{name} functions" if name else "functions"
    limits = []
    if options.popularity_cap is not None:
        limits.append(f"at most {options.popularity_cap:,} requests")
    if name:
        limits.append(f"at least {MIN_ARRIVALS} requests, without which there is no class")
    if options.trigger is not None:
        limits.append(f"the trigger {options.trigger}")
    having = f" with {' and '.join(limits)}" if limits else ""
    asked = f"{wanted} {what} are asked for, and" if wanted is not None else f"{what} are asked for, and"
    return (
        f"{asked} the time that is taken has {there}{having}; ask for fewer, take a longer or another time, or allow"
        " more popular ones"
    )
