"""Which policies run, and their few numbers. Every field is also a setting of the server and of the simulator."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Switch = Literal["on", "off"]
PreloadSetting = Literal["on", "off", "lru"]


class PolicySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sharing: Switch = "on"  # off: every worker has a private copy of its backbone
    preload: PreloadSetting = "on"  # off: nothing is there before a request needs it; lru: keep what was used last
    offload: Switch = "on"  # off: above the watermark nothing is moved out; new work waits or is refused
    batching: Switch = "on"  # off: one request at a time per worker, first come first served

    slo_ttft_s: Annotated[float, Meta(gt=0)] = 10.0  # of functions that do not name their own
    keep_alive_min_s: Annotated[float, Meta(gt=0)] = 5.0
    keep_alive_max_s: Annotated[float, Meta(gt=0)] = 600.0
    watermark: Annotated[float, Meta(gt=0, le=1)] = 0.9  # share of a memory above which offloading starts
    # Money of one second of waiting against money of one GB held for one second: below this nothing is held ahead.
    # Seconds of waiting saved per second and GB.
    min_gain_per_gb: Annotated[float, Meta(ge=0)] = 1e-4
