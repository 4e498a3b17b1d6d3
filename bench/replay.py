"""Replay a trace against a server, open loop: every request goes out at its time, whatever became of those before it.

    python bench/replay.py --url http://127.0.0.1:8000 --trace azf2019_mixed_24ad_60min --minutes 0:10 --compress 2.5

A trace is JSON lines (gzipped or not) of `timestamp` (ms), `model`, `input_length`, `output_length` (tokens). A bare
name is looked for under $SERVERLESSLORA_TRACES. Time is compressed, never thinned: leaving requests out at random would
turn bursts into a Poisson process. Both lengths are scaled by one factor. The models of the trace become functions of
the server, in the order of their names.

Latency counts from the time a request was meant to go out, so that a client that falls behind cannot flatter the
server. When its own lag is more than 50 ms for one request in a hundred, the run says that it is invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

MAX_LAG_S = 0.05  # of the client itself, 99th percentile
WITHIN_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # the distribution of first tokens, at these points
SHED = (429, 503)


class Arrival(NamedTuple):
    at_s: float  # after the start of the replay
    model: str
    prompt_tokens: int
    output_tokens: int


# --- traces


def find_trace(name: str) -> Path:
    """A file, or the name of one under $SERVERLESSLORA_TRACES (also in `derived`, also without its endings)."""
    if (path := Path(name)).is_file():
        return path
    root = os.environ.get("SERVERLESSLORA_TRACES")
    if root is None:
        raise SystemExit(f"no trace at {name}; set SERVERLESSLORA_TRACES to the folder that traces are looked for in")
    for folder in (Path(root), Path(root) / "derived"):
        for ending in ("", ".jsonl", ".jsonl.gz"):
            if (path := folder / (name + ending)).is_file():
                return path
    raise SystemExit(f"no trace {name!r} under {root}")


def read_trace(path: Path) -> list[Arrival]:
    """In the order of time. Raises ValueError naming the line that is no request."""
    arrivals = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                arrivals.append(
                    Arrival(
                        row["timestamp"] / 1000,
                        str(row.get("model", "")),
                        int(row["input_length"]),
                        int(row["output_length"]),
                    )
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is not a request of a trace: {error!r}") from error
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def cut(arrivals: Iterable[Arrival], from_s: float, to_s: float) -> list[Arrival]:
    """Those of [from_s, to_s), their times counted from its beginning."""
    return [each._replace(at_s=each.at_s - from_s) for each in arrivals if from_s <= each.at_s < to_s]


def scale(
    arrivals: Iterable[Arrival], *, compress: float, length: float, max_tokens: int | None = None
) -> list[Arrival]:
    """Time divided by `compress`, both lengths times `length`; at least one token each, together at most `max_tokens`.

    What exceeds `max_tokens` is cut from the prompt: the output decides how long a request holds its worker.
    """

    def tokens(count: int) -> int:
        return max(1, round(count * length))

    scaled = []
    for each in arrivals:
        prompt, output = tokens(each.prompt_tokens), tokens(each.output_tokens)
        if max_tokens is not None:
            output = min(output, max_tokens - 1)
            prompt = min(prompt, max_tokens - output)
        scaled.append(Arrival(each.at_s / compress, each.model, prompt, output))
    return scaled


def rename(arrivals: Sequence[Arrival], functions: Sequence[str]) -> list[Arrival]:
    """The n-th model of the trace, by name, becomes the n-th function. Raises ValueError when there are too few."""
    models = sorted({each.model for each in arrivals})
    if len(models) > len(functions):
        raise ValueError(f"the trace has {len(models)} models and the server {len(functions)} functions; deploy more")
    names = dict(zip(models, functions, strict=False))
    return [each._replace(model=names[each.model]) for each in arrivals]


def poisson(rate: float, seconds: float, functions: Sequence[str], shape: tuple[int, int], seed: int) -> list[Arrival]:
    """`rate` requests per second at exponential gaps, of one shape (tokens in, tokens out), over all functions."""
    rng = random.Random(seed)
    arrivals, now = [], rng.expovariate(rate)
    while now < seconds:
        arrivals.append(Arrival(now, rng.choice(functions), *shape))
        now += rng.expovariate(rate)
    return arrivals


# --- sending


@dataclass(frozen=True)
class Outcome:
    """What became of one request; seconds, latencies from when it was meant to go out."""

    function: str
    intended_at: float  # on the clock of the replay's start
    lag_s: float  # of the client
    status: int = 0  # of HTTP; 0: no answer
    ttft_s: float | None = None
    e2e_s: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    rung: str = ""
    retry_after: str | None = None
    error: str = ""

    @property
    def is_answered(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def is_shed(self) -> bool:
        return self.status in SHED


Send = Callable[[Arrival, float], Awaitable[Outcome]]  # the second: when it was meant to go out, on `time.monotonic`


async def replay(
    arrivals: Sequence[Arrival], send: Send, on_done: Callable[[Outcome], None] = lambda _: None
) -> Replay:
    """Sends each at its time and waits for all answers, also those after the last was sent."""
    outcomes: list[Outcome] = []
    began = time.monotonic()

    async def run(arrival: Arrival, due: float) -> None:
        outcomes.append(await send(arrival, due))
        on_done(outcomes[-1])

    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            due = began + arrival.at_s
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            group.create_task(run(arrival, due))
    return Replay(began, time.monotonic(), outcomes)


@dataclass(frozen=True)
class Replay:
    began_at: float
    ended_at: float
    outcomes: list[Outcome] = field(repr=False)

    def lag_p99_s(self) -> float:
        return percentile([each.lag_s for each in self.outcomes], 99)

    @property
    def is_valid(self) -> bool:
        return bool(self.outcomes) and self.lag_p99_s() <= MAX_LAG_S


class HttpSender:
    """Streamed completions with prompts of random token ids, never repeated, and outputs of the exact length."""

    def __init__(
        self, url: str, *, token_ids: tuple[int, int] = (300, 4000), slo_s: float | None = None, seed: int = 0
    ):
        self._url = f"{url}/v1/completions"
        self._random = random.Random(seed)
        self._range = token_ids
        self._headers = {} if slo_s is None else {"x-slo-ttft-ms": str(round(1000 * slo_s))}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpSender:
        timeout = aiohttp.ClientTimeout(total=900)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def __call__(self, arrival: Arrival, due: float) -> Outcome:
        assert self._session is not None
        body = {
            "model": arrival.model,
            "prompt": [self._random.randrange(*self._range) for _ in range(arrival.prompt_tokens)],
            "max_tokens": arrival.output_tokens,
            "min_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # the first token counts also when it is half a character and shows no text
        }
        outcome = Outcome(arrival.model, due, max(0.0, time.monotonic() - due))
        try:
            async with self._session.post(self._url, json=body, headers=self._headers) as answer:
                if answer.status != 200:
                    text = (await answer.text())[:300]
                    retry_after = answer.headers.get("retry-after")
                    after_s = time.monotonic() - due
                    return replace(outcome, status=answer.status, e2e_s=after_s, retry_after=retry_after, error=text)
                return await self._read(answer, outcome, due, arrival.output_tokens)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return replace(outcome, error=repr(error))

    async def _read(self, answer: aiohttp.ClientResponse, outcome: Outcome, due: float, wanted: int) -> Outcome:
        first = last = None
        prompt = tokens = 0
        error = ""
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                error = str(event["error"])[:300]
                continue
            if any(choice.get("token_ids") for choice in event["choices"]):
                last = time.monotonic()
                first = first or last
            if usage := event.get("usage"):
                prompt, tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if not error and tokens != wanted:
            error = f"{tokens} tokens came, {wanted} were asked for"
        # Absent on a request that found everything in its place.
        rung = answer.headers.get("x-serverlesslora-cold", "hot").split(";")[0].split(",")[0]
        return replace(
            outcome,
            status=200,
            ttft_s=None if first is None else first - due,
            e2e_s=None if last is None else last - due,
            prompt_tokens=prompt,
            tokens=tokens,
            rung=rung,
            error=error,
        )


# --- results


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: a value that was really seen. NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else math.nan


def summary(done: Replay, *, slo_s: float) -> dict[str, Any]:
    """Attainment and `within` are shares of all requests that were sent: what was shed or failed did not meet them."""
    outcomes = done.outcomes
    answered = [each for each in outcomes if each.is_answered and each.ttft_s is not None]
    first = [each.ttft_s for each in answered if each.ttft_s is not None]
    whole = [each.e2e_s for each in answered if each.e2e_s is not None]
    failed = [each for each in outcomes if not each.is_answered and not each.is_shed]

    def share(limit_s: float) -> float:
        return round(sum(each <= limit_s for each in first) / len(outcomes), 4) if outcomes else math.nan

    def times(values: Sequence[float]) -> dict[str, float]:
        mean = sum(values) / len(values) if values else math.nan
        return {"mean": mean, **{f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}}

    return {
        "valid": done.is_valid,
        "client_lag_p99_ms": 1000 * done.lag_p99_s(),
        "seconds": done.ended_at - done.began_at,
        "sent": len(outcomes),
        "answered": len(answered),
        "shed": sum(each.is_shed for each in outcomes),
        "failed": len(failed),
        "failures": dict(Counter(f"{each.status}: {each.error[:120]}" for each in failed).most_common(5)),
        "ttft_s": times(first),
        "e2e_s": times(whole),
        "slo_ttft_s": slo_s,
        "slo_attainment": share(slo_s),
        "first_token_within_s": {f"{limit:g}": share(limit) for limit in WITHIN_S},
        "rungs": dict(Counter(each.rung for each in answered)),
        "prompt_tokens": sum(each.prompt_tokens for each in answered),
        "output_tokens": sum(each.tokens for each in answered),
    }


# --- command line


def minutes(text: str) -> tuple[float, float]:
    try:
        begin, end = (float(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO in minutes, such as 10:25") from None
    if not 0 <= begin < end:
        raise argparse.ArgumentTypeError(f"{text!r}: minutes must grow, from 0 on")
    return begin, end


def factor(text: str) -> float:
    """`1/32` or `0.03125`."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor such as 1/32") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be more than 0")
    return value


async def functions_of(url: str) -> list[str]:
    """Names of the deployed functions, without the backbones (which have no parent)."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as answer:
        models = (await answer.json())["data"]
    return sorted(model["id"] for model in models if model.get("parent"))


async def main() -> None:
    from bench.harness import report  # only here: who imports this module for its replay needs no bench around it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="address of a running server")
    parser.add_argument("--trace", required=True, help="file, or name under $SERVERLESSLORA_TRACES")
    parser.add_argument("--minutes", type=minutes, default=(0.0, math.inf), metavar="A:B", help="window of the trace")
    parser.add_argument("--compress", type=factor, default=1.0, help="time is divided by this [1]; scale timers too")
    parser.add_argument("--length-scale", type=factor, default=1 / 32, help="of prompts and outputs [1/32]")
    parser.add_argument("--max-tokens", type=int, help="longest prompt and output together; default: no limit")
    parser.add_argument("--slo", type=float, default=10.0, help="objective for the first token, seconds [10]")
    parser.add_argument("--send-slo", action="store_true", help="also tell the server, as a header")
    parser.add_argument("--token-ids", type=int, nargs=2, default=(97, 123), help="prompts are drawn from [97 123)")
    parser.add_argument("--out", type=Path, help="also write one JSON line per request to this file")
    arguments = parser.parse_args()
    begin, end = arguments.minutes
    arrivals = cut(read_trace(find_trace(arguments.trace)), 60 * begin, 60 * end)
    arrivals = scale(
        arrivals, compress=arguments.compress, length=arguments.length_scale, max_tokens=arguments.max_tokens
    )
    arrivals = rename(arrivals, await functions_of(arguments.url))
    progress = Progress(len(arrivals))
    slo_s = arguments.slo if arguments.send_slo else None
    async with HttpSender(arguments.url, token_ids=tuple(arguments.token_ids), slo_s=slo_s) as send:
        done = await replay(arrivals, send, progress)
    if arguments.out:
        with arguments.out.open("w") as file:
            for each in done.outcomes:
                file.write(json.dumps({**vars(each), "intended_at": each.intended_at - done.began_at}) + "\n")
    report(
        "replay",
        trace=arguments.trace,
        minutes=[begin, min(end, 1e9)],
        compress=arguments.compress,
        length_scale=arguments.length_scale,
        **summary(done, slo_s=arguments.slo),
    )
    if not done.is_valid:
        raise SystemExit(f"INVALID: the client was late by {1000 * done.lag_p99_s():.0f} ms for one request in 100")


class Progress:
    """A line on stderr every few seconds: a replay takes minutes."""

    def __init__(self, total: int, every_s: float = 10.0) -> None:
        self._total = total
        self._every_s = every_s
        self._began = self._told_at = time.monotonic()
        self._count: Counter[str] = Counter()

    def __call__(self, outcome: Outcome) -> None:
        self._count["answered" if outcome.is_answered else "shed" if outcome.is_shed else "failed"] += 1
        now = time.monotonic()
        if now - self._told_at >= self._every_s:
            self._told_at = now
            counts = ", ".join(f"{count} {what}" for what, count in sorted(self._count.items()))
            print(f"  {now - self._began:4.0f} s: {counts} of {self._total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
