"""What /metrics reads when somebody looks: gauges of the backend, and our series once more under vLLM's names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from serverlesslora.gateway.backend import BackendStats

LORA_NAMES = 200  # that one label of vllm:lora_requests_info may list


class State(Collector):
    def __init__(self, stats: Callable[[], BackendStats], wall_clock: Callable[[], float] = time.time) -> None:
        self._stats = stats
        self._wall_clock = wall_clock
        self._adapters: tuple[str, ...] = ()  # the labels of the last reading
        self._changed_at = wall_clock()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text, value in (
            ("num_requests_running", "Requests in a step or about to be.", stats.running),
            ("num_requests_waiting", "Requests that wait.", stats.waiting),
            ("kv_cache_usage_perc", "Used share of all KV blocks, 0 to 1.", stats.kv_usage),
        ):
            yield GaugeMetricFamily(f"vllm:{name}", text, value)
            yield GaugeMetricFamily(f"serverlesslora_{name}", text, value)
        for name, text, size in (
            ("memory_held_bytes", "Held by backbones, processes, adapters and KV.", stats.held_bytes),
            ("memory_capacity_bytes", "What the server may hold.", stats.capacity_bytes),
        ):
            yield GaugeMetricFamily(f"serverlesslora_{name}", text, size)
        for name, text, count in (
            ("num_preemptions", "Sequences that gave up their KV blocks.", stats.preemptions),
            ("prefix_cache_queries", "Tokens looked up in prefix caches.", stats.prefix_queries),
            ("prefix_cache_hits", "Tokens found in prefix caches.", stats.prefix_hits),
        ):
            yield CounterMetricFamily(f"vllm:{name}", text, count)
        yield _by("memory_bytes", "Memory by what it is for.", "kind", stats.memory)
        yield _by("workers", "Worker processes by state.", "state", stats.workers)
        running = [(kind, running) for kind, running, _ in stats.domains]
        waiting = [(kind, waiting) for kind, _, waiting in stats.domains]
        yield _by("domain_requests_running", "Requests in a step, by kind of isolation domain.", "kind", running)
        yield _by("domain_requests_waiting", "Requests that wait, by kind of isolation domain.", "kind", waiting)
        yield _info("vllm:cache_config_info", "The KV cache of all workers.", _blocks(stats), 1.0)
        yield _info("serverlesslora_price_info", "What money is counted in.", {"currency": stats.currency}, 1.0)
        yield self._lora(stats)

    def _lora(self, stats: BackendStats) -> Metric:
        """One set of labels only, whose value is the time it came to be: nobody has to guess which one is true."""
        names = {
            "max_lora": str(stats.max_adapters),
            "running_lora_adapters": ",".join(stats.running_adapters[:LORA_NAMES]),
            "waiting_lora_adapters": ",".join(stats.waiting_adapters[:LORA_NAMES]),
        }
        if (adapters := tuple(names.values())) != self._adapters:
            self._adapters, self._changed_at = adapters, self._wall_clock()
        text = "Functions whose adapters are loaded, and those that requests wait for; the value is when that changed."
        return _info("vllm:lora_requests_info", text, names, self._changed_at)


def _by(
    name: str, text: str, label: str, values: tuple[tuple[str, int], ...] | list[tuple[str, int]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"serverlesslora_{name}", text, labels=(label,))
    for key, value in values:
        family.add_metric((key,), value)
    return family


def _info(name: str, text: str, labels: Mapping[str, str], value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _blocks(stats: BackendStats) -> dict[str, str]:
    return {"block_size": str(stats.kv_block_size), "num_gpu_blocks": str(stats.kv_blocks)}


class Aliases(Collector):
    """The same values under vLLM's names (label `model_name`), without counting anything twice."""

    def __init__(self, aliases: Mapping[str, Counter | Histogram]) -> None:
        self._aliases = aliases

    def collect(self) -> Iterator[Metric]:
        for alias, original in self._aliases.items():
            for family in original.collect():
                copy = Metric(alias, family.documentation, family.type)
                copy.samples = [
                    Sample(alias + each.name.removeprefix(family.name), _renamed(each.labels), each.value)
                    for each in family.samples
                ]
                yield copy


_NAMES = {"function": "model_name", "reason": "finished_reason"}


def _renamed(labels: dict[str, str]) -> dict[str, str]:
    return {_NAMES.get(name, name): value for name, value in labels.items()}
