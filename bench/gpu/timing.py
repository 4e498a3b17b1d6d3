"""Times of device work, by events around replays of a graph that holds many calls on different memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from bench.gpu.record import Setting

CACHE_BYTES = 192 << 20  # inputs of calls in a row are spread over several times the L2, or they would be timed in it
_WARM_UPS = 3


def copies_for(num_bytes: int, setting: Setting, *, most: int = 64) -> int:
    """How many sets of inputs of this size are needed so that none is found in the cache."""
    return 1 if setting.is_dry else max(2, min(most, -(-CACHE_BYTES // max(1, num_bytes))))


class Stopwatch:
    """On host memory every call runs once and the time is the wall's: it means nothing, but the code has run."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def graph_us(self, calls: Sequence[Callable[[], object]], *, repeats: int = 11, at_least: int = 16) -> float:
        """Median microseconds of one call, all of them captured in one graph: no launch gaps, cold inputs."""
        if self._setting.is_dry:
            return self._once(calls)
        calls = list(calls) * -(-at_least // len(calls))
        for call in calls[: max(2, len(set(map(id, calls))))]:
            call()  # compiled, and libraries have chosen, before anything is captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        median = self._median_us(graph.replay, repeats) / len(calls)
        torch.cuda.synchronize()
        return median

    def eager_us(self, call: Callable[[], object], *, repeats: int = 11, inner: int = 1) -> float:
        """Median microseconds of one call as it is launched from Python."""
        if self._setting.is_dry:
            return self._once([call])

        def several() -> None:
            for _ in range(inner):
                call()

        return self._median_us(several, repeats) / inner

    def wall_us(self, call: Callable[[], object], *, repeats: int = 5) -> float:
        """Median wall-clock microseconds from an idle device to an idle device."""
        times = []
        for _ in range(1 if self._setting.is_dry else repeats):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e6

    def synchronize(self) -> None:
        if not self._setting.is_dry:
            torch.cuda.synchronize()

    def _median_us(self, call: Callable[[], object], repeats: int) -> float:
        times: list[float] = []
        for _ in range(_WARM_UPS + repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times[_WARM_UPS:])

    def _once(self, calls: Sequence[Callable[[], object]]) -> float:
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) * 1e6 / len(calls)
