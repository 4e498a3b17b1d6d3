"""The policies of one server or one simulation, chosen by its settings."""

from __future__ import annotations

from typing import NamedTuple

from serverlesslora.scheduler.arrivals import ArrivalModel
from serverlesslora.scheduler.keep_alive import FixedKeepAlive, KeepAlive
from serverlesslora.scheduler.offloader import LruOffloader, NoOffloader, Offloader
from serverlesslora.scheduler.preloader import LruPreloader, NoPreloader, Preloader
from serverlesslora.scheduler.settings import PolicySettings

# A function nobody has called yet is expected once in a week: too seldom to hold anything for it.
NEVER_SEEN_GAP_S = 7 * 86400.0


class Policies(NamedTuple):
    arrivals: ArrivalModel
    keep_alive: KeepAlive | FixedKeepAlive
    preloader: Preloader | LruPreloader | NoPreloader
    offloader: Offloader | LruOffloader | NoOffloader


def build_policies(
    settings: PolicySettings, *, arrivals: ArrivalModel | None = None, idle_timeout_s: float | None = None
) -> Policies:
    """`idle_timeout_s`: a fixed time instead of one chosen from arrivals. `arrivals`: what was learned before."""
    arrivals = arrivals or ArrivalModel(prior_gap_s=NEVER_SEEN_GAP_S)
    learns = settings.preload == "on" and idle_timeout_s is None
    return Policies(
        arrivals=arrivals,
        keep_alive=KeepAlive(settings, arrivals) if learns else FixedKeepAlive(settings, idle_timeout_s),
        preloader={"on": Preloader, "lru": LruPreloader, "off": NoPreloader}[settings.preload](settings),
        offloader=_offloader(settings),
    )


def _offloader(settings: PolicySettings) -> Offloader | LruOffloader | NoOffloader:
    if settings.offload == "off":
        return NoOffloader(settings)
    return LruOffloader(settings) if settings.preload == "lru" else Offloader(settings)
