"""From a trace to what is replayed of it: a window, some of its adapters, faster, with other names and lengths.

Requests are never left out at random, which would turn bursts into a Poisson process: CV_thin² = 1 + p (CV² - 1). The
rate is changed by compressing time or by choosing adapters as a whole; both leave every adapter's gaps what they are.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from serverlesslora_loadgen.classes import CLASSES, adapter_facts
from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.trace import TraceRequest

Numbers = NDArray[np.int64]  # [adapters] of requests
AdapterMap = Mapping[str, str] | tuple[str, ...]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What is done, in this order. Seconds are the trace's own, before it is compressed."""

    start_s: float = 0.0  # window [start, start + duration); the time of its beginning becomes 0
    duration_s: float | None = None  # None: to the end
    functions: int | None = None  # so many adapters, chosen at random
    rate_by_selection: float | None = None  # requests per second AS REPLAYED; as near as whole adapters come to it
    max_requests: int | None = None  # what comes later is cut off
    speedup: float = 1.0  # every time is divided by it
    model: str = ""  # of requests that name none, as if the trace said so
    models: AdapterMap | None = None  # the trace's name → the server's; or the server's, for the trace's in their order
    length_scale: float = 1.0  # of prompts and answers alike
    max_tokens: int | None = None  # longest prompt and answer together: what the server's context holds
    seed: int = 0  # of the choice of adapters


class Shaped(NamedTuple):
    requests: list[TraceRequest]
    notes: list[str]  # what was done that anybody who reads the results has to know


def shape(requests: Sequence[TraceRequest], by: Shape) -> Shaped:
    """Raises WorkloadError when a field makes no sense, or nothing is left to replay."""
    _validate(by)
    notes: list[str] = []
    ends_s = requests[-1].timestamp / 1000 - by.start_s if requests else 0.0
    shaped = _window(requests, by, notes)
    if by.model:
        shaped = [each if each.model else replace(each, model=by.model) for each in shaped]
    shaped = _choose(shaped, by, ends_s, notes)
    if by.max_requests is not None and len(shaped) > by.max_requests:
        notes.append(f"cut off after the first {by.max_requests} of {len(shaped)} requests")
        shaped = shaped[: by.max_requests]
    if by.models is not None:
        shaped = _rename(shaped, by.models, notes)
    shaped = _classify(shaped, notes)  # of whom the server sees: adapters that became one are asked as one
    if by.speedup != 1:
        shaped = [replace(each, timestamp=each.timestamp / by.speedup) for each in shaped]
        notes.append(
            f"time divided by {by.speedup:g}: every idle and keep-alive timer of the server has to be divided by it"
            " too, or cold starts are rarer than the trace would make them"
        )
    return Shaped(_scale(shaped, by, notes), notes)


def _validate(by: Shape) -> None:
    if not 0 <= by.start_s < math.inf:
        raise WorkloadError(f"start_s is {by.start_s}; give a finite number, 0 or more")
    for name in ("duration_s", "rate_by_selection", "speedup", "length_scale"):
        value = getattr(by, name)
        if value is not None and not 0 < value < math.inf:
            raise WorkloadError(f"{name} is {value}; give a finite number, more than 0")
    for name, least in (("functions", 1), ("max_requests", 1), ("max_tokens", 2)):
        value = getattr(by, name)
        if value is not None and value < least:
            raise WorkloadError(f"{name} is {value}; give at least {least}")


def _window(requests: Sequence[TraceRequest], by: Shape, notes: list[str]) -> list[TraceRequest]:
    start_ms = 1000 * by.start_s
    end_ms = math.inf if by.duration_s is None else start_ms + 1000 * by.duration_s
    kept = [
        replace(each, timestamp=each.timestamp - start_ms) for each in requests if start_ms <= each.timestamp < end_ms
    ]
    if not kept:
        last_s = requests[-1].timestamp / 1000 if requests else 0.0
        raise WorkloadError(
            f"no request of the trace is left: it has {len(requests)}, the last at {last_s:g} s, and what is asked for"
            f" begins at {by.start_s:g} s; choose another window"
        )
    if len(kept) < len(requests):
        until = "the end" if by.duration_s is None else f"{by.start_s + by.duration_s:g} s"
        notes.append(f"window from {by.start_s:g} s to {until}: {len(kept)} of {len(requests)} requests")
    return kept


# --- which adapters


def _choose(requests: list[TraceRequest], by: Shape, ends_s: float, notes: list[str]) -> list[TraceRequest]:
    """`ends_s`: the last request of the trace, after the beginning of the window."""
    if by.functions is None and by.rate_by_selection is None:
        return requests
    numbers = sorted(Counter(each.model for each in requests).items())
    if by.functions is not None and by.functions > len(numbers):
        raise WorkloadError(f"{by.functions} adapters are asked for and the trace has {len(numbers)} in this window")
    seconds = ends_s if by.duration_s is None else min(by.duration_s, ends_s)  # a window may be longer than the trace
    wanted = None if by.rate_by_selection is None else by.rate_by_selection * seconds / by.speedup
    chosen = select(np.array([n for _, n in numbers]), functions=by.functions, total=wanted, seed=by.seed)
    names = {numbers[i][0] for i in chosen}
    kept = [each for each in requests if each.model in names]
    notes.append(f"{len(names)} of {len(numbers)} adapters chosen whole, seed {by.seed}: {len(kept)} requests")
    if by.rate_by_selection is not None and seconds > 0:
        found = len(kept) / seconds * by.speedup
        notes.append(f"{by.rate_by_selection:g} requests per second asked for by selection, {found:.3g} found")
    return kept


def select(numbers: Numbers, *, functions: int | None, total: float | None, seed: int) -> list[int]:
    """Positions of the adapters to keep, ascending: `functions` of them, of `total` requests together, or both.

    A random choice is made first, so that it has popular and rare adapters as the trace has them; then single ones are
    added, dropped or exchanged as long as that brings the sum nearer to `total`.
    """
    order = np.random.default_rng(seed).permutation(len(numbers))
    if total is None:
        return sorted(order[:functions].tolist())
    chosen = np.zeros(len(numbers), dtype=bool)
    if functions is not None:
        chosen[order[:functions]] = True
    else:
        room = total
        for i in order.tolist():
            if numbers[i] <= room:
                chosen[i], room = True, room - numbers[i]
        if not chosen.any():
            chosen[order[0]] = True
    while (move := _nearer(numbers, chosen, total, fixed=functions is not None)) is not None:
        chosen[list(move)] ^= True
    return np.flatnonzero(chosen).tolist()


def _nearer(numbers: Numbers, chosen: NDArray[np.bool_], total: float, *, fixed: bool) -> tuple[int, ...] | None:
    """The move, as positions to turn over, that brings the sum of the chosen nearest to `total`; None: none does."""
    inside, outside = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    now = int(numbers[chosen].sum())
    moves: list[tuple[int, tuple[int, ...]]] = []
    if not fixed:
        moves += [(now + int(numbers[i]), (i,)) for i in outside.tolist()]
        if len(inside) > 1:
            moves += [(now - int(numbers[i]), (i,)) for i in inside.tolist()]
    if len(inside) and len(outside):
        sums = now - numbers[inside][:, None] + numbers[outside]  # [inside, outside]
        row, column = divmod(int(np.argmin(np.abs(sums - total))), len(outside))
        moves.append((int(sums[row, column]), (int(inside[row]), int(outside[column]))))
    best, move = min(moves, key=lambda each: abs(each[0] - total), default=(now, ()))
    return move if abs(best - total) < abs(now - total) else None


# --- what becomes of each request


def _classify(requests: list[TraceRequest], notes: list[str]) -> list[TraceRequest]:
    """Requests without a class get that of their adapter in what is replayed. A class of the trace is kept."""
    found = {each.model: each.class_ for each in adapter_facts(requests)}
    told: dict[str, set[str]] = defaultdict(set)
    for each in requests:
        if each.class_ is not None:
            told[each.model].add(each.class_)
    strayed = sum(
        found[model] is not None and bool(classes & set(CLASSES)) and classes != {found[model]}
        for model, classes in told.items()
    )
    if strayed:
        notes.append(
            f"{strayed} adapters are of another class in what is replayed than the trace says; its word is kept"
        )
    return [each if each.class_ is not None else replace(each, class_=found[each.model]) for each in requests]


def _rename(requests: list[TraceRequest], models: AdapterMap, notes: list[str]) -> list[TraceRequest]:
    names = sorted({each.model for each in requests})
    if isinstance(models, Mapping):
        if missing := [name for name in names if name not in models]:
            raise WorkloadError(
                f"the map says nothing of {', '.join(map(repr, missing[:5]))}{' …' if len(missing) > 5 else ''},"
                f" {len(missing)} of the trace's {len(names)} adapters; add them"
            )
        renamed = {name: models[name] for name in names}
        merged = len(names) - len(set(renamed.values()))
        if merged:
            notes.append(
                f"the map gives {merged} adapters the name of another: together they are less bursty than alone, and"
                " have the class that they have together"
            )
    else:
        if len(names) > len(models):
            raise WorkloadError(
                f"the trace has {len(names)} adapters and {len(models)} are served; serve more, or choose among the"
                f" trace's (functions = {len(models)})"
            )
        renamed = dict(zip(names, models, strict=False))
    sources = Counter(renamed.values())
    return [
        replace(
            each,
            model=renamed[each.model],
            # What the trace says of how one of several is asked is not true of all of them.
            class_=None if sources[renamed[each.model]] > 1 and each.class_ in CLASSES else each.class_,
        )
        for each in requests
    ]


def _scale(requests: list[TraceRequest], by: Shape, notes: list[str]) -> list[TraceRequest]:
    """At least one token each. What exceeds `max_tokens` is cut from the prompt first: answers decide how long a
    request holds its worker. Prompts that are given as text stay as they are.
    """
    scaled, cut = [], 0
    for each in requests:
        is_given = each.prompt is not None or each.messages is not None
        prompt = each.input_length if is_given else _tokens(each.input_length, by.length_scale)
        answer = _tokens(each.output_length, by.length_scale)
        blocks = each.hash_ids
        if by.max_tokens is not None and prompt + answer > by.max_tokens:
            cut += 1
            answer = max(1, min(answer, by.max_tokens - (prompt if is_given else 1)))
            if not is_given:
                whole, prompt = prompt, by.max_tokens - answer
                if blocks:  # whole ones, so that they keep their length and equal prefixes stay equal
                    left = max(1, len(blocks) * prompt // whole)
                    prompt = min(prompt, round(left * whole / len(blocks)))
                    blocks = blocks[:left]
        scaled.append(replace(each, input_length=prompt, output_length=answer, hash_ids=blocks))
    given = sum(each.prompt is not None or each.messages is not None for each in requests)
    if by.length_scale != 1:
        notes.append(f"lengths times {by.length_scale:g}, at least one token")
        if given:
            notes.append(f"{given} requests bring their own prompt; only the length of their answers was scaled")
    if cut:
        notes.append(f"{cut} requests shortened to {by.max_tokens} tokens, prompt and answer together")
    return scaled


def _tokens(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def read_map(path: Path) -> AdapterMap:
    """JSON or TOML: an object of the trace's name → the server's, or a list of the server's (in TOML as `models`).

    Raises WorkloadError.
    """
    try:
        text = path.read_text()
        data: object = tomllib.loads(text) if path.suffix == ".toml" else msgspec.json.decode(text)
        if isinstance(data, dict) and isinstance(data.get("models"), list):
            data = data["models"]
        models: AdapterMap = msgspec.convert(data, dict[str, str] | tuple[str, ...])
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read the map {path}: {error}") from error
    except (tomllib.TOMLDecodeError, msgspec.MsgspecError) as error:
        raise WorkloadError(
            f"{path} maps no adapters: {error}; give name = name pairs, or a list of names as `models`"
        ) from error
    return models
