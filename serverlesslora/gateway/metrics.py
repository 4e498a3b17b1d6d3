"""The gateway's numbers, in a registry of their own: ours by function, and under the names vLLM's dashboards expect.

What is counted here is also told to the `History`, which the live page draws. Gauges and vLLM's names are read from the
backend and copied from ours when somebody looks: `metrics_views`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from serverlesslora.gateway.backend import BackendStats, Cold, GenerationRequest
from serverlesslora.gateway.history import History, Who
from serverlesslora.gateway.journal import current_journal
from serverlesslora.gateway.metrics_views import Aliases, State
from serverlesslora_ipc.messages import Delta, Finished

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
OTHER = "other"  # the label of functions beyond the cap

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_INTER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_COLD = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_CHOICES = (1, 2, 5, 10, 20)

# A timestamp per series says nothing here and doubles the page.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """All series; `function` labels stop growing at `max_functions`, so that names cannot fill the memory.

    Implements `live_state.Spending`.
    """

    def __init__(self, stats: Callable[[], BackendStats], max_functions: int, history: History | None = None) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.history = history or History()
        self._max_functions = max_functions
        self._labels: set[str] = {""}
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
        self.finished = counter(
            "finished_prompts", "Prompts answered to the end, by why their last choice ended.", ("function", "reason")
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.", by_function)
        self.cached_tokens = counter("cached_prompt_tokens", "Prompt tokens met in a prefix cache.", by_function)
        self.generation_tokens = counter("generation_tokens", "Output tokens of finished requests.", by_function)
        self.device_seconds = counter("device_seconds", "Share of device steps.", by_function)
        self.costs = counter(
            "cost",
            "Money, in the price file's currency. The platform pays device and memory (told once a minute; what is "
            "nobody's alone has no function), the tenant pays what is charged.",
            ("function", "part"),
        )
        self.residency = counter(
            "residency_byte_seconds", "Memory held, times how long; told once a minute.", ("function", "kind")
        )
        self.cold_starts = counter("cold_starts", "Requests by the rung of the ladder they met.", ("function", "rung"))
        self.cold_seconds = histogram("cold_start_seconds", "Time of one part of a cold start.", ("part",), _COLD)
        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", by_function, _LATENCY)
        self.inter_token = histogram("inter_token_seconds", "Between outputs of a choice.", by_function, _INTER_TOKEN)
        self.per_token = histogram(
            "time_per_output_token_seconds", "Mean of a request after its first token.", by_function, _INTER_TOKEN
        )
        self.duration = histogram("request_seconds", "Arrival to last token.", by_function, _LATENCY)
        self.queue = histogram("queue_seconds", "Wait inside the worker.", by_function, _LATENCY)
        self.prefill = histogram(
            "prefill_seconds", "In the worker, from the end of its queue to the first token.", by_function, _LATENCY
        )
        self.decode = histogram("decode_seconds", "First to last token.", by_function, _LATENCY)
        self.inference = histogram("inference_seconds", "Prefill and decode.", by_function, _LATENCY)
        self.prompt_size = histogram("request_prompt_tokens", "Tokens of a prompt.", by_function, _TOKENS)
        self.output_size = histogram("request_generation_tokens", "Output tokens of a prompt.", by_function, _TOKENS)
        self.asked_n = histogram("request_params_n", "Choices asked for, of every prompt.", by_function, _CHOICES)
        self.asked_tokens = histogram(
            "request_params_max_tokens", "Limit of the output asked for, where there was one.", by_function, _TOKENS
        )
        self.registry.register(State(stats))
        self.registry.register(
            Aliases(
                {
                    "vllm:time_to_first_token_seconds": self.first_token,
                    "vllm:inter_token_latency_seconds": self.inter_token,
                    "vllm:request_time_per_output_token_seconds": self.per_token,
                    "vllm:e2e_request_latency_seconds": self.duration,
                    "vllm:request_queue_time_seconds": self.queue,
                    "vllm:request_prefill_time_seconds": self.prefill,
                    "vllm:request_decode_time_seconds": self.decode,
                    "vllm:request_inference_time_seconds": self.inference,
                    "vllm:request_prompt_tokens": self.prompt_size,
                    "vllm:request_generation_tokens": self.output_size,
                    "vllm:request_params_n": self.asked_n,
                    "vllm:request_params_max_tokens": self.asked_tokens,
                    "vllm:prompt_tokens": self.prompt_tokens,
                    "vllm:generation_tokens": self.generation_tokens,
                    "vllm:request_success": self.finished,
                }
            )
        )

    def label(self, function: str) -> str:
        if function in self._labels:
            return function
        if len(self._labels) > self._max_functions:  # one of them is of no function
            return OTHER
        self._labels.add(function)
        return function

    def record(self, function: str, tenant: str | None = None) -> RequestRecord:
        """`tenant`: whose function it is."""
        return RequestRecord(self, (function, tenant), self.label(function))

    def asked(self, function: str, generations: Iterable[GenerationRequest]) -> None:
        """What clients ask for, whatever becomes of it."""
        label = self.label(function)
        for each in generations:
            self.asked_n.labels(label).observe(each.n)
            if each.sampling.max_tokens is not None:
                self.asked_tokens.labels(label).observe(each.sampling.max_tokens)

    def spent(self, function: str, tenant: str | None, device: float, charged: float | None) -> None:
        label = self.label(function)
        self.costs.labels(label, "device").inc(device)
        if charged is not None:
            self.costs.labels(label, "charged").inc(charged)
        self.history.cost((function, tenant), device)

    def held(self, function: str, tenant: str | None, kind: str, byte_s: float, money: float) -> None:
        label = self.label(function)
        self.residency.labels(label, kind).inc(byte_s)
        self.costs.labels(label, "memory").inc(money)
        self.history.cost((function, tenant), money)

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def page_for(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics for who asks for it.

        The client library's own negotiation would turn the colon of vLLM's names, which is legal, into an underscore.
        """
        if "application/openmetrics-text" in accept:
            return openmetrics.generate_latest(self.registry, escaping=openmetrics.ALLOWUTF8), OPENMETRICS  # type: ignore[no-untyped-call]
        return self.page(), CONTENT_TYPE


class _Prompt:
    """One generation of a request. Times of `perf_counter`."""

    __slots__ = ("first", "last", "reason")

    def __init__(self, now: float) -> None:
        self.first = now
        self.last: dict[int, float] = {}  # by choice
        self.reason = "stop"


class RequestRecord:
    """The numbers of one request, counted while it runs. `delta` is called for every token of every stream."""

    def __init__(self, metrics: Metrics, function: Who, label: str) -> None:
        self._metrics = metrics
        self._function = function
        self._label = label
        self._arrived = time.perf_counter()
        self._prompts: dict[int, _Prompt] = {}
        self._by_id: dict[str, _Prompt] = {}  # the same: Finished knows its generation, not its place
        self._tokens = 0
        self._observe_inter_token = metrics.inter_token.labels(label).observe
        self._journal = current_journal()
        self._journal.opened()

    def cold(self, cold: Cold) -> None:
        self._journal.started(cold)
        self._metrics.cold_starts.labels(self._label, cold.rung).inc()
        for part, seconds in cold.parts:
            self._metrics.cold_seconds.labels(part).observe(seconds)
        self._metrics.history.cold(self._function, cold.rung, sum(seconds for _, seconds in cold.parts))

    def delta(self, prompt: int, delta: Delta) -> None:
        now = time.perf_counter()
        of = self._prompts.get(prompt)
        if of is None:
            of = self._began(prompt, delta, now)
        if delta.token_ids:  # the end of a prompt that was only echoed or scored has none
            index = delta.index
            if index in of.last:
                self._observe_inter_token(now - of.last[index])
            of.last[index] = now
        if delta.finish_reason is not None:
            of.reason = delta.finish_reason
            self._journal.finish_reasons.append(delta.finish_reason)
            self._metrics.choices.labels(self._label, delta.finish_reason).inc()

    def _began(self, prompt: int, delta: Delta, now: float) -> _Prompt:
        if delta.token_ids and not self._prompts:
            self._journal.first_token()
            self._metrics.first_token.labels(self._label).observe(now - self._arrived)
            self._metrics.history.first_token(self._function, now - self._arrived)
        of = self._prompts[prompt] = self._by_id[delta.request_id] = _Prompt(now)
        return of

    def finished(self, finished: Finished) -> None:
        self._journal.finished(finished)
        metrics, label = self._metrics, self._label
        of = self._by_id.get(finished.request_id)  # None: an embedding has no output
        self._tokens += finished.completion_tokens
        metrics.finished.labels(label, of.reason if of else "stop").inc()
        metrics.prompt_tokens.labels(label).inc(finished.prompt_tokens)
        metrics.cached_tokens.labels(label).inc(finished.cached_tokens)
        metrics.generation_tokens.labels(label).inc(finished.completion_tokens)
        metrics.device_seconds.labels(label).inc(finished.device_s)
        metrics.queue.labels(label).observe(finished.queue_s)
        metrics.prompt_size.labels(label).observe(finished.prompt_tokens)
        metrics.output_size.labels(label).observe(finished.completion_tokens)
        if of is None or not of.last:
            return
        decode_s = max(of.last.values()) - of.first
        metrics.decode.labels(label).observe(decode_s)
        if (steps := finished.completion_tokens / len(of.last) - 1) > 0:
            metrics.per_token.labels(label).observe(decode_s / steps)
        if finished.first_token_s:
            prefill_s = max(0.0, finished.first_token_s - finished.queue_s)
            metrics.prefill.labels(label).observe(prefill_s)
            metrics.inference.labels(label).observe(prefill_s + decode_s)

    def close(self, status: int) -> None:
        self._journal.closed(status)
        metrics, label = self._metrics, self._label
        metrics.requests.labels(label, str(status)).inc()
        metrics.history.ended(self._function, tokens=self._tokens, failed=status >= 500 or status == 429)
        if status == 200:
            metrics.duration.labels(label).observe(time.perf_counter() - self._arrived)
        else:
            metrics.choices.labels(label, "abort" if status == 499 else "error").inc()
