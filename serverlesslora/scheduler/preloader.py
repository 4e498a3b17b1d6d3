"""What to load ahead of requests and where, so that the seconds of waiting saved are worth the memory.

`Preloader` decides by value (its greedy is in `draft`), `LruPreloader` only keeps what was used last, `NoPreloader`
leaves everything to requests. All are asked the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from serverlesslora.scheduler.artifacts import Artifact, Place, Plan
from serverlesslora.scheduler.draft import Draft
from serverlesslora.scheduler.explaining import recency_verdicts, verdicts
from serverlesslora.scheduler.packing import Packing
from serverlesslora.scheduler.settings import PolicySettings


class Preloader:
    """The pre-loading scheduler of ServerlessLoRA (arXiv 2505.14468, section 4.1), with hysteresis.

    Nothing is swapped for less than `swap_ratio` times its value per byte, and nothing moved less than `cool_down_s`
    ago is moved again, except for what is pinned or when a place is over its limit. `plan` remembers nothing: tell
    `moved` what was carried out, by whomever.
    """

    def __init__(self, settings: PolicySettings, *, swap_ratio: float = 2.0, cool_down_s: float = 30.0) -> None:
        assert swap_ratio >= 1
        self._settings = settings
        self._swap_ratio = swap_ratio
        self._cool_down_s = cool_down_s
        self._moved_at: dict[str, dict[str, float]] = {}  # artifact -> place -> when

    def moved(self, artifact_id: str, place_id: str, now: float) -> None:
        """It was loaded or evicted there: starts its cool-down."""
        self._moved_at.setdefault(artifact_id, {})[place_id] = now

    def plan(
        self,
        places: Sequence[Place],
        artifacts: Sequence[Artifact],
        placed: Mapping[str, Collection[str]],  # place_id -> what lies there; each of it is among the artifacts
        *,
        now: float,
        in_use: Collection[tuple[str, str]] = (),  # (place_id, artifact_id)
        explain: bool = True,  # False: no verdicts; with ten thousands of artifacts they cost as much as the plan
    ) -> Plan:
        self._forget(now)
        packing = Packing(
            places, artifacts, placed, watermark=self._settings.watermark, in_use=in_use, resting=self._moved_at
        )
        draft = Draft(packing, self._settings, self._swap_ratio)
        draft.finish()
        told = verdicts(packing, draft.why, self._settings, self._swap_ratio) if explain else ()
        return Plan(tuple(draft.moves()), tuple(told))

    def _forget(self, now: float) -> None:
        recent = {
            name: {place_id: at for place_id, at in moves.items() if now - at < self._cool_down_s}
            for name, moves in self._moved_at.items()
        }
        self._moved_at = {name: moves for name, moves in recent.items() if moves}


class LruPreloader:
    """Never loads ahead. What was used last stays until room is needed; verdicts say what leaves first then."""

    def __init__(self, settings: PolicySettings) -> None:
        self._settings = settings

    def moved(self, artifact_id: str, place_id: str, now: float) -> None:
        pass

    def plan(
        self,
        places: Sequence[Place],
        artifacts: Sequence[Artifact],
        placed: Mapping[str, Collection[str]],
        *,
        now: float,
        in_use: Collection[tuple[str, str]] = (),
        explain: bool = True,
    ) -> Plan:
        if not explain:
            return Plan()
        packing = Packing(places, artifacts, placed, watermark=self._settings.watermark, in_use=in_use)
        return Plan(verdicts=tuple(recency_verdicts(packing, now)))


class NoPreloader:
    """Nothing is there before a request needs it."""

    def __init__(self, settings: PolicySettings) -> None:
        pass

    def moved(self, artifact_id: str, place_id: str, now: float) -> None:
        pass

    def plan(
        self,
        places: Sequence[Place],
        artifacts: Sequence[Artifact],
        placed: Mapping[str, Collection[str]],
        *,
        now: float,
        in_use: Collection[tuple[str, str]] = (),
        explain: bool = True,
    ) -> Plan:
        return Plan()
