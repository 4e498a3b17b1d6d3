"""A price file: what a second of a device, a GB of memory and a request cost, and what that is worth.

The shape is that of the server's own price file, so one file serves both; prices of tokens, which tenants are charged
and nobody pays, are not looked at.
"""

from __future__ import annotations

import datetime
import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from serverlesslora_loadgen.errors import ObjectiveError

GB = 1e9
DEFAULT = "default"

Text = Annotated[str, Meta(min_length=1)]


class GbSecond(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: float
    device: float


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    date: datetime.date
    source: Text
    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}$")]
    device_second: dict[str, float]
    gb_second: GbSecond
    illustrative: bool = False
    request: float = 0.0
    tokens: dict[str, float] | None = None  # the server's; never counted here

    def __post_init__(self) -> None:
        if DEFAULT not in self.device_second:
            raise ValueError(f"`device_second` needs an entry `{DEFAULT}`, for devices that are not named")
        named = {f"device_second.{name}": price for name, price in self.device_second.items()}
        named |= {"gb_second.host": self.gb_second.host, "gb_second.device": self.gb_second.device}
        named["request"] = self.request
        for name, price in named.items():
            if not 0 <= price < math.inf:
                raise ValueError(f"`{name}` is {price}; a price is a finite number, 0 or more")

    def device_price(self, device: str | None) -> float:
        """Per second. The longest entry the device's name contains, whatever the case: "NVIDIA H200" is an H200."""
        name = (device or "").casefold()
        fitting = [entry for entry in self.device_second if entry != DEFAULT and entry.casefold() in name]
        return self.device_second[max(fitting, key=len, default=DEFAULT)]

    def memory(self, byte_s: Mapping[str, float]) -> float:
        """Of byte-seconds by tier: host, device."""
        host, device = byte_s.get("host", 0.0), byte_s.get("device", 0.0)
        return (host * self.gb_second.host + device * self.gb_second.device) / GB

    def devices(self, device_s: Mapping[str, float]) -> float:
        """Of seconds by the device's name."""
        return sum(seconds * self.device_price(name) for name, seconds in device_s.items())

    @property
    def label(self) -> str:
        """What must stand beside every amount."""
        kind = "illustrative prices" if self.illustrative else "prices"
        return f"{kind} of {self.date.isoformat()} in {self.currency}: {self.source}"

    def as_facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = msgspec.to_builtins(self)
        del facts["tokens"]
        return facts


def read_prices(path: Path | None = None) -> Prices:
    """The file, or the built-in illustration. Raises ObjectiveError naming the file and the field."""
    try:
        if path is None:
            text = resources.files("serverlesslora_loadgen.money").joinpath("prices.toml").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
        return msgspec.convert(tomllib.loads(text), Prices)
    except (OSError, UnicodeDecodeError) as error:
        raise ObjectiveError(f"cannot read the prices {path}: {error}") from error
    except (msgspec.ValidationError, tomllib.TOMLDecodeError) as error:
        raise ObjectiveError(f"bad price file {path}: {error}") from error
