"""What usage costs: a price file, and the money of requests, of memory and of sums.

Two totals that never mix: what the platform pays (device seconds, byte-seconds), and what the tenant is charged (token
prices, if the file has any). All money is in the file's currency. The paper's two formulas are here as well
(ServerlessLoRA, arXiv 2505.14468, section 6).
"""

from __future__ import annotations

import datetime
import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from serverlesslora.config import read_toml
from serverlesslora.errors import ConfigError
from serverlesslora.metering.usage import RequestUsage, Residency, UsageRow
from serverlesslora.scheduler.artifacts import Tier

Price = Annotated[float, Meta(ge=0)]
Text = Annotated[str, Meta(min_length=1)]
GB = 1e9
DEFAULT = "default"


class Money(msgspec.Struct, frozen=True):
    """`paid` by the platform is the sum of its two parts. `charged` to the tenant is None without token prices."""

    device: float = 0.0
    holding: float = 0.0
    charged: float | None = None
    paid: float = 0.0


class TokenPrices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Per 1000 tokens. Whatever was processed is charged, however the request ended."""

    prompt: Price
    output: Price
    cached: Price | None = None  # prompt tokens found in the prefix cache; None: as the others

    def charge(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        cached = self.prompt if self.cached is None else self.cached
        fresh_tokens = prompt_tokens - cached_tokens
        return (fresh_tokens * self.prompt + cached_tokens * cached + completion_tokens * self.output) / 1000


class GbSecond(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: Price
    device: Price


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    date: datetime.date
    source: Text
    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}$")]
    device_second: dict[str, float]
    gb_second: GbSecond
    illustrative: bool = False
    tokens: TokenPrices | None = None

    def __post_init__(self) -> None:
        if DEFAULT not in self.device_second:
            raise ValueError(f"`device_second` needs an entry `{DEFAULT}`, for devices that are not named")
        named = {f"device_second.{name}": price for name, price in self.device_second.items()}
        named |= {f"gb_second.{tier}": getattr(self.gb_second, tier) for tier in ("host", "device")}
        if self.tokens is not None:
            named |= {f"tokens.{name}": getattr(self.tokens, name) or 0.0 for name in self.tokens.__struct_fields__}
        for name, price in named.items():
            if not 0 <= price < math.inf:
                raise ValueError(f"`{name}` is {price}; a price is a finite number, 0 or more")

    def device_price(self, device: str | None) -> float:
        """Per second. The longest entry the device's name contains, whatever the case: "NVIDIA H200" is an H200."""
        name = (device or "").casefold()
        fitting = [entry for entry in self.device_second if entry != DEFAULT and entry.casefold() in name]
        return self.device_second[max(fitting, key=len, default=DEFAULT)]

    def request_money(self, usage: RequestUsage, *, device: str | None = None) -> Money:
        """`device`: for usage that names none."""
        return self._money({usage.device or device or DEFAULT: usage.device_s}, {}, usage)

    def request_cost(self, usage: RequestUsage, *, device: str | None = None) -> float:
        """What a budget counts: the charge where tokens have prices, else what the device seconds cost."""
        return counted(self.request_money(usage, device=device))

    def holding_cost(self, residency: Residency) -> float:
        return self._holding({residency.tier: residency.byte_s})

    def row_money(self, row: UsageRow) -> Money:
        return self._money(row.device_s_of, row.byte_s, row)

    def _holding(self, byte_s: Mapping[str, float]) -> float:
        prices: dict[Tier, float] = {"host": self.gb_second.host, "device": self.gb_second.device}
        return sum(byte_s.get(tier, 0.0) / GB * price for tier, price in prices.items())

    def _money(
        self, device_s: Mapping[str, float], byte_s: Mapping[str, float], tokens: RequestUsage | UsageRow
    ) -> Money:
        device = sum(seconds * self.device_price(name) for name, seconds in device_s.items())
        holding = self._holding(byte_s)
        charged = None
        if self.tokens is not None:
            charged = self.tokens.charge(tokens.prompt_tokens, tokens.cached_tokens, tokens.completion_tokens)
        return Money(device, holding, charged, device + holding)


def counted(money: Money) -> float:
    """What counts against a budget. Memory does not: who shares a backbone with others cannot foresee its part."""
    return money.device if money.charged is None else money.charged


def read_prices(path: str | Path | None = None) -> Prices:
    """The file, or the built-in illustration. Raises ConfigError naming the file and the field."""
    if path is None:
        text = resources.files("serverlesslora.metering").joinpath("prices.toml").read_text("utf-8")
        return msgspec.convert(tomllib.loads(text), Prices)
    try:
        return msgspec.convert(read_toml(str(path)), Prices)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bad price file {path}: {error}") from error


def alive_cost(alive: Iterable[tuple[float, float]]) -> float:
    """cost = Σ alive_s · price per second, over everything that was alive (ServerlessLoRA, section 6)."""
    return sum(alive_s * price for alive_s, price in alive)


def cost_effectiveness(e2e_s: float, cost: float) -> float:
    """1 / (E2E · cost): more is better, in 1/(s · money) (ServerlessLoRA, section 6). Infinite when either is 0."""
    product = e2e_s * cost
    return 1 / product if product > 0 else math.inf
