"""Arguments that several commands have: which part of a trace, which server, and how both are spoken of."""

from __future__ import annotations

import argparse
import base64
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.plan import Target
from serverlesslora_loadgen.run import served_models
from serverlesslora_loadgen.shaping import AdapterMap, Shape, Shaped, read_map, shape
from serverlesslora_loadgen.trace import read_trace
from serverlesslora_loadgen.units import parse_factor, parse_seconds

T = TypeVar("T")
SERVED = "served"


def of(parse: Callable[[str], T]) -> Callable[[str], T]:
    """What it complains about becomes argparse's own complaint, with the option's name."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except (LoadgenError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


seconds = of(parse_seconds)
factor = of(parse_factor)


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def whole(least: int) -> Callable[[str], int]:
    """A number of things, or a seed."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too few: give {least} or more")
        return number

    return convert


def positive(text: str) -> float:
    return _amount(text, math.ulp(0.0), "more than 0")


def not_negative(text: str) -> float:
    return _amount(text, 0.0, "0 or more")


def _amount(text: str, least: float, words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a finite number, {words}")
    return value


def timer(text: str) -> tuple[str, float]:
    name, value = pair(text)
    return name, seconds(value)


def ids(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW:HIGH, such as 300:4000") from None
    if not 0 <= found[0] < found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} holds no token id: LOW must be below HIGH, and 0 or more")
    return found


# --- a trace


def add_trace(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the trace", "cut, chosen from and compressed; never thinned")
    group.add_argument("--trace", type=Path, required=True, metavar="FILE", help="JSON lines, also .gz")
    group.add_argument("--start", type=seconds, default=0.0, metavar="TIME", help="where the window begins [0]")
    group.add_argument("--duration", type=seconds, metavar="TIME", help="of the window, in the trace's own time")
    group.add_argument("--max-requests", type=int, metavar="N", help="cut off what comes later")
    group.add_argument("--functions", type=int, metavar="N", help="so many whole adapters, chosen by --seed")
    group.add_argument(
        "--rate-by-selection", type=float, metavar="RPS", help="choose whole adapters to come near this rate"
    )
    group.add_argument("--speedup", type=factor, default=1.0, metavar="S", help="time divided by this, timers too [1]")
    group.add_argument("--length-scale", type=factor, default=1.0, metavar="K", help="of prompts and answers [1]")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest prompt and answer together")
    group.add_argument(
        "--map",
        metavar="FILE|served",
        help="trace name → the server's (JSON or TOML); `served`: the server's adapters, in the order of their names",
    )
    group.add_argument("--model", default="", metavar="NAME", help="that is asked where the trace names none")
    group.add_argument("--seed", type=whole(0), default=0, help="of choices and of made-up prompts [0]")


def shaped(parsed: argparse.Namespace, url: str | None = None, headers: dict[str, str] | None = None) -> Shaped:
    """Raises LoadgenError. `url`: the server that `--map served` asks."""
    models: AdapterMap | None = None
    if parsed.map == SERVED:
        if url is None:
            raise LoadgenError("--map served needs a server to ask; give a file here")
        models = tuple(adapters_of(url, headers or {}))
    elif parsed.map is not None:
        models = read_map(Path(parsed.map))
    return shape(
        read_trace(parsed.trace),
        Shape(
            start_s=parsed.start,
            duration_s=parsed.duration,
            functions=parsed.functions,
            rate_by_selection=parsed.rate_by_selection,
            max_requests=parsed.max_requests,
            speedup=parsed.speedup,
            model=parsed.model,
            models=models,
            length_scale=parsed.length_scale,
            max_tokens=parsed.max_tokens,
            seed=parsed.seed,
        ),
    )


def adapters_of(url: str, headers: dict[str, str]) -> list[str]:
    """Names of the models that have a parent, as vLLM and ours list adapters; where none has, of all models."""
    models = served_models(url, headers)
    return sorted([model.id for model in models if model.parent] or [model.id for model in models])


# --- a server


def add_target(parser: argparse.ArgumentParser) -> None:
    default = Target(url="")
    group = parser.add_argument_group("the server")
    group.add_argument("--url", required=True, help="of the server, without /v1")
    group.add_argument("--endpoint", choices=("completions", "chat"), default=default.endpoint)
    group.add_argument(
        "--prompt",
        choices=("ids", "text"),
        help="made-up prompts as token ids (exact lengths) or as text; default: ids for completions, text for chat",
    )
    group.add_argument(
        "--token-ids", type=ids, default=default.token_ids, metavar="LOW:HIGH", help="prompts are drawn from [300:4000)"
    )
    group.add_argument("--tokens-per-word", type=positive, default=default.tokens_per_word, help="of made-up text [1]")
    group.add_argument("--temperature", type=not_negative, default=default.temperature, help="[0]")
    group.add_argument(
        "--natural-end", action="store_true", help="answers end when they end; else exactly the trace's length is asked"
    )
    group.add_argument(
        "--no-token-counts", action="store_true", help="do not ask for token ids, which count tokens exactly"
    )
    group.add_argument("--api-key", metavar="KEY", help="sent as bearer; never written down")
    group.add_argument("--header", type=pair, action="append", default=[], metavar="NAME=VALUE")
    group.add_argument(
        "--cold-header", default=default.cold_header, help="in which it says what was cold [%(default)s]"
    )
    group.add_argument("--deadline-header", metavar="NAME", help="to tell it the trace's deadlines, in ms")
    group.add_argument("--timeout", type=seconds, default=default.timeout_s, metavar="TIME", help="of a request [600s]")
    group.add_argument("--stall", type=seconds, default=default.stall_s, metavar="TIME", help="between tokens [60s]")


def login(url: str) -> tuple[str, dict[str, str]]:
    """`http://name:password@host` becomes the address alone, and the header that the rest stands for, as in curl."""
    if (found := re.fullmatch(r"(https?://)([^/?#\s]*)@(.*)", url)) is None:
        return url, {}
    secret = base64.b64encode(unquote(found[2]).encode()).decode()
    return found[1] + found[3], {"authorization": f"Basic {secret}"}


def target(parsed: argparse.Namespace) -> Target:
    url, headers = login(parsed.url)
    headers |= parsed.header
    if parsed.api_key:
        headers["authorization"] = f"Bearer {parsed.api_key}"
    return Target(
        url=url.rstrip("/").removesuffix("/v1"),
        endpoint=parsed.endpoint,
        prompt=parsed.prompt or ("ids" if parsed.endpoint == "completions" else "text"),
        token_ids=parsed.token_ids,
        tokens_per_word=parsed.tokens_per_word,
        temperature=parsed.temperature,
        ignore_eos=not parsed.natural_end,
        token_counts=not parsed.no_token_counts,
        headers=headers,
        cold_header=parsed.cold_header,
        deadline_header=parsed.deadline_header,
        timeout_s=parsed.timeout,
        stall_s=parsed.stall,
    )
