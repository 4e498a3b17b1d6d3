"""The gateway's numbers, in a registry of their own: ours by function, and the names vLLM's dashboards expect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from serverlesslora.gateway.backend import BackendStats, Cold
from serverlesslora_ipc.messages import Delta, Finished

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"  # the label of functions beyond the cap

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_INTER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_COLD = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# A timestamp per series says nothing here and doubles the page.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """All series; `function` labels stop growing at `max_functions`, so that names cannot fill the memory."""

    def __init__(self, stats: Callable[[], BackendStats], max_functions: int) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._max_functions = max_functions
        self._labels: set[str] = set()
        prefix, by_function = "serverlesslora_", ("function",)

        def counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
            return Counter(prefix + name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(prefix + name, text, labels, buckets=buckets, registry=self.registry)

        self.responses = counter("http_responses", "Answers by route and status.", ("route", "status"))
        self.requests = counter(
            "requests", "Generation requests by outcome; 499: the client left.", ("function", "status")
        )
        self.choices = counter("choices", "Choices by why they ended.", ("function", "reason"))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.", by_function)
        self.cached_tokens = counter("cached_prompt_tokens", "Prompt tokens met in a prefix cache.", by_function)
        self.generation_tokens = counter("generation_tokens", "Output tokens of finished requests.", by_function)
        self.device_seconds = counter("device_seconds", "Share of device steps.", by_function)
        self.cold_starts = counter("cold_starts", "Requests by the rung of the ladder they met.", ("function", "rung"))
        self.cold_seconds = histogram("cold_start_seconds", "Time of one part of a cold start.", ("part",), _COLD)
        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", by_function, _LATENCY)
        self.inter_token = histogram("inter_token_seconds", "Between outputs of a choice.", by_function, _INTER_TOKEN)
        self.duration = histogram("request_seconds", "Arrival to last token.", by_function, _LATENCY)
        self.queue = histogram("queue_seconds", "Wait inside the worker.", by_function, _LATENCY)
        self.registry.register(_State(stats))
        self.registry.register(
            _Aliases(
                {
                    "vllm:time_to_first_token_seconds": self.first_token,
                    "vllm:inter_token_latency_seconds": self.inter_token,
                    "vllm:e2e_request_latency_seconds": self.duration,
                    "vllm:request_queue_time_seconds": self.queue,
                    "vllm:prompt_tokens": self.prompt_tokens,
                    "vllm:generation_tokens": self.generation_tokens,
                    "vllm:request_success": self.choices,
                }
            )
        )

    def label(self, function: str) -> str:
        if function in self._labels:
            return function
        if len(self._labels) >= self._max_functions:
            return OTHER
        self._labels.add(function)
        return function

    def record(self, function: str) -> RequestRecord:
        return RequestRecord(self, self.label(function))

    def page(self) -> bytes:
        return generate_latest(self.registry)


class RequestRecord:
    """The numbers of one request, counted while it runs."""

    def __init__(self, metrics: Metrics, label: str) -> None:
        self._metrics = metrics
        self._label = label
        self._arrived = time.perf_counter()
        self._last: dict[tuple[int, int], float] = {}
        self._inter_token = metrics.inter_token.labels(label)

    def cold(self, cold: Cold) -> None:
        self._metrics.cold_starts.labels(self._label, cold.rung).inc()
        for part, seconds in cold.parts:
            self._metrics.cold_seconds.labels(part).observe(seconds)

    def delta(self, prompt: int, delta: Delta) -> None:
        now = time.perf_counter()
        key = (prompt, delta.index)
        if (last := self._last.get(key)) is not None:
            self._inter_token.observe(now - last)
        elif not self._last:
            self._metrics.first_token.labels(self._label).observe(now - self._arrived)
        self._last[key] = now
        if delta.finish_reason is not None:
            self._metrics.choices.labels(self._label, delta.finish_reason).inc()

    def finished(self, finished: Finished) -> None:
        label = self._label
        self._metrics.prompt_tokens.labels(label).inc(finished.prompt_tokens)
        self._metrics.cached_tokens.labels(label).inc(finished.cached_tokens)
        self._metrics.generation_tokens.labels(label).inc(finished.completion_tokens)
        self._metrics.device_seconds.labels(label).inc(finished.device_s)
        self._metrics.queue.labels(label).observe(finished.queue_s)

    def close(self, status: int) -> None:
        self._metrics.requests.labels(self._label, str(status)).inc()
        if status == 200:
            self._metrics.duration.labels(self._label).observe(time.perf_counter() - self._arrived)
        else:
            self._metrics.choices.labels(self._label, "abort" if status == 499 else "error").inc()


class _State(Collector):
    """Gauges read from the backend when somebody looks."""

    def __init__(self, stats: Callable[[], BackendStats]) -> None:
        self._stats = stats

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
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are loaded and adapters that requests wait for; the value is the time of the reading.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        names = (",".join(stats.running_adapters), ",".join(stats.waiting_adapters))
        info.add_metric((str(stats.max_adapters), *names), time.time())
        yield info


class _Aliases(Collector):
    """The same values under vLLM's names (label `model_name`), without counting anything twice."""

    def __init__(self, aliases: dict[str, Counter | Histogram]) -> None:
        self._aliases = aliases

    def collect(self) -> Iterator[Metric]:
        for alias, original in self._aliases.items():
            for family in original.collect():
                copy = Metric(alias, family.documentation, family.type)
                copy.samples = [
                    Sample(alias + each.name.removeprefix(family.name), _renamed(each.labels), each.value)
                    for each in family.samples
                    if each.labels.get("reason") not in ("abort", "error")
                ]
                yield copy


_NAMES = {"function": "model_name", "reason": "finished_reason"}


def _renamed(labels: dict[str, str]) -> dict[str, str]:
    return {_NAMES.get(name, name): value for name, value in labels.items()}
