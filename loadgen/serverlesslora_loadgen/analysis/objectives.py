"""What people ask of a server, `--slo` and `--limit`, and whether a run met it.

    ttft=500ms:p99   a percentile of ttft, ttst, tpot, gap (the longest of a request) or e2e
    errors=0         at most so many failed, or a share of all that was sent: errors=0.1%
    shed=1%          the same of what the server refused
    wrong=0          the same of answers of another model, or unlike the golden ones
    cold=5%          the same of requests that met something cold, of those the server said it of
    attainment=99%   at least so many within the limits, of all that was sent

A request that was shed, failed or never left is later than any limit: a server cannot look fast by refusing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import msgspec
import numpy as np

from serverlesslora_loadgen.analysis import statistics
from serverlesslora_loadgen.analysis.columns import Columns
from serverlesslora_loadgen.errors import LoadgenError, ObjectiveError
from serverlesslora_loadgen.record import UNKNOWN, WARM
from serverlesslora_loadgen.result import Limits, Objective
from serverlesslora_loadgen.units import parse_seconds, show_seconds

ObjectiveText = str

# A server that gives such answers is not slow or full but wrong, and no objective can allow that.
INCORRECT = (
    *("wrong-model", "wrong-answer", "truncated", "usage-mismatch", "length-mismatch"),
    *("no-finish-reason", "no-usage", "malformed"),
)
WRONG = ("wrong-model", "wrong-answer")
IMPLIED = ("errors=0", "shed=5%")  # unless the person says something of the same
MIN_ANSWERED = 0.5  # of all that was sent; whatever was allowed, with fewer nothing was served to speak of

LATENCIES = {"ttft": "ttft", "ttst": "ttst", "tpot": "tpot", "gap": "max_gap", "e2e": "e2e"}
COUNTED = ("errors", "shed", "wrong", "cold")
_REMEDY = "say what a good answer is, for example --limit ttft=500ms,tpot=50ms"
_EXAMPLES = "ttft=500ms:p99, e2e=10s:p95, errors=0, shed=1%, wrong=0, cold=5% or attainment=99%"


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One objective, read."""

    text: str
    name: str
    limit: float  # seconds, a share, or a number of requests
    share: Fraction | None = None  # of the percentile; None: it is not about a time
    is_count: bool = False


class Judged(msgspec.Struct, frozen=True):
    objective: Objective
    reason: str  # empty when it was met


# --- reading


def parse_objective(text: ObjectiveText) -> Asked:
    """Raises ObjectiveError."""
    name, equals, value = (part.strip() for part in text.strip().lower().partition("="))
    text = f"{name}={value}"
    if not equals or name not in (*LATENCIES, *COUNTED, "attainment"):
        raise ObjectiveError(f"{text!r} is no objective; say for example {_EXAMPLES}")
    if name in LATENCIES:
        limit, _, percentile = (part.strip() for part in value.partition(":"))
        if not percentile:
            raise ObjectiveError(f"{text!r} does not say of which percentile; say for example {name}={limit}:p99")
        return Asked(text=text, name=name, limit=_positive_seconds(limit, text), share=_percentile(percentile, text))
    if name == "attainment":
        return Asked(text=text, name=name, limit=_share(value, text))
    if value.endswith("%"):
        return Asked(text=text, name=name, limit=_share(value, text))
    if not re.fullmatch(r"[0-9]+", value):
        raise ObjectiveError(f"{text!r}: {value!r} is neither a number of requests such as 0 nor a share such as 1%")
    return Asked(text=text, name=name, limit=float(value), is_count=True)


def parse_limits(text: str) -> Limits:
    """`ttft=500ms,tpot=50ms`: what a request has to meet to count as good. Raises ObjectiveError."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (each.strip() for each in part.lower().partition("="))
        if not equals or name not in ("ttft", "tpot", "e2e"):
            raise ObjectiveError(f"{part!r} is no limit of a request; say for example ttft=500ms,tpot=50ms,e2e=10s")
        if name in found:
            raise ObjectiveError(f"{text!r} has two limits for {name}; give one")
        found[name] = _positive_seconds(value, part)
    if not found:
        raise ObjectiveError(f"{text!r} has no limit in it; say for example ttft=500ms,tpot=50ms")
    return Limits(ttft_s=found.get("ttft"), tpot_s=found.get("tpot"), e2e_s=found.get("e2e"))


def has_meaning(limits: Limits, *, deadlines: bool = False) -> bool:
    """Whether attainment says more than that requests were answered."""
    return deadlines or limits != Limits()


def check_objectives(texts: Sequence[ObjectiveText], limits: Limits, *, deadlines: bool) -> None:
    """Before a run. `deadlines`: requests of the trace have some. Raises ObjectiveError."""
    for asked in map(parse_objective, texts):
        if asked.name == "attainment" and not has_meaning(limits, deadlines=deadlines):
            raise ObjectiveError(f"{asked.text!r} of no limits is met by anything; {_REMEDY}")


def _positive_seconds(value: str, text: str) -> float:
    try:
        seconds = parse_seconds(value)
    except LoadgenError as error:
        raise ObjectiveError(f"{text!r}: {error}") from error
    if seconds <= 0:
        raise ObjectiveError(f"{text!r}: nothing takes no time; give more than 0")
    return seconds


def _percentile(value: str, text: str) -> Fraction:
    if value == "max":
        return Fraction(1)
    if not re.fullmatch(r"p[0-9]{1,3}(\.[0-9]{1,4})?", value) or not 0 < Fraction(value[1:]) <= 100:
        raise ObjectiveError(f"{text!r}: {value!r} is no percentile such as p50, p99, p99.9 or max")
    return Fraction(value[1:]) / 100


def _share(value: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?%?", value):
        raise ObjectiveError(f"{text!r}: {value!r} is not a share such as 99%")
    share = float(Fraction(value[:-1]) / 100 if value.endswith("%") else Fraction(value))
    if share > 1:
        raise ObjectiveError(f"{text!r}: {value!r} is more than all; a share is written as 99% or 0.99")
    return share


# --- judging


def judge(asked: Sequence[Asked], columns: Columns, *, verified: bool, has_limits: bool = True) -> list[Judged]:
    """Those that were asked, then those that are implied; whatever of it, also before the end of the warm-up.

    `has_limits`: there is more to a good request than that it was answered.
    """
    named = {each.name for each in asked}
    implied = [each for each in map(parse_objective, IMPLIED) if each.name not in named]
    return [_judge(each, columns, verified, has_limits) for each in (*asked, *implied)]


def flaws(columns: Columns) -> list[str]:
    """What no objective can allow, in sentences."""
    table, said = columns.table, []
    incorrect = {name: count for name in INCORRECT if (count := _failures(columns, (name,)))}
    if incorrect:
        kinds = ", ".join(f"{count:,} {name}" for name, count in incorrect.items())
        said.append(f"answers were not correct: {kinds}")
    answered = int((~np.isnan(table.ttft)).sum())  # with a token at least
    if answered < MIN_ANSWERED * len(table):
        said.append(f"only {answered:,} of {len(table):,} requests were answered")
    return said


def _judge(asked: Asked, columns: Columns, verified: bool, has_limits: bool) -> Judged:
    if asked.share is not None:
        return _judge_latency(asked, asked.share, columns)
    table, n = columns.table, len(columns.table)
    if n == 0:
        return _judged(asked, None, "no request was sent")
    if asked.name == "attainment" and not has_limits:
        return _judged(asked, None, f"no limits were set; {_REMEDY}")
    if asked.name == "attainment":
        return _judged(asked, int(table.good.sum()) / n)
    if asked.name == "errors":
        return _judged(asked, _amount(asked, int(table.failed.sum()), n))
    if asked.name == "shed":
        return _judged(asked, _amount(asked, int(table.shed.sum()), n))
    if asked.name == "wrong":
        wrong = _failures(columns, WRONG)
        if not verified and not wrong:
            return _judged(asked, None, "answers were not held against golden ones; give --verify")
        return _judged(asked, _amount(asked, wrong, n))
    kinds = np.bincount(table.cold, minlength=len(columns.colds))
    told = {name: int(count) for name, count in zip(columns.colds, kinds, strict=True) if name != UNKNOWN and count}
    if not told:
        return _judged(asked, None, "the server did not say which requests were cold")
    cold = sum(count for name, count in told.items() if name != WARM)
    return _judged(asked, _amount(asked, cold, sum(told.values())))


def _judge_latency(asked: Asked, share: Fraction, columns: Columns) -> Judged:
    values = columns.table.or_never(LATENCIES[asked.name])
    values = values[~np.isnan(values)]
    if not len(values):
        return _judged(asked, None, "nothing was measured")
    found = float(np.partition(values, at := statistics.rank(len(values), share) - 1)[at])
    if np.isinf(found):
        never = int(np.isinf(values).sum())
        return _judged(asked, None, f"{never:,} of {len(values):,} requests were never answered")
    return _judged(asked, found)


def _failures(columns: Columns, names: Sequence[str]) -> int:
    codes = [code for code, name in enumerate(columns.failures) if name in names]
    return int(np.isin(columns.table.failure, codes).sum())


def _amount(asked: Asked, count: int, n: int) -> float:
    return float(count) if asked.is_count else count / n


def _judged(asked: Asked, found: float | None, why: str = "") -> Judged:
    met = found is not None and (found >= asked.limit if asked.name == "attainment" else found <= asked.limit)
    objective = Objective(text=asked.text, limit=asked.limit, found=found, met=met)
    reason = "" if met else f"{asked.text} was asked, {why or f'{_show(asked, found)} was found'}"
    return Judged(objective, reason)


def _show(asked: Asked, found: float | None) -> str:
    if found is None:
        return "nothing"
    if asked.share is not None:
        return show_seconds(found)
    return f"{found:,.0f}" if asked.is_count else f"{100 * found:.4g} %"
