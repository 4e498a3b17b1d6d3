"""A trace per generation request for an OpenTelemetry collector: OTLP over HTTP, sent by a thread in the background.

Spans are made when a request is over, from the times in its journal, so that tracing costs nothing while tokens flow.
Attributes follow OpenTelemetry's semantic conventions for generative AI; prompts and outputs are not among them. A
collector that does not answer is told of once in the log; what it misses is thrown away.

The usual variables of OpenTelemetry's SDK work: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_SCHEDULE_DELAY and their like.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import serverlesslora
from serverlesslora.errors import ConfigError
from serverlesslora.gateway.journal import Journal

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger("serverlesslora.tracing")

# Routes that generate, by the conventions' names of operations.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/generate": "text_completion",
    "/v1/embeddings": "embeddings",
}
PROPAGATED = (b"traceparent", b"tracestate")
TRACES_PATH = "/v1/traces"
EXPORT_TIMEOUT_S = 5.0
LAST_EXPORT_S = 3.0  # that a server that ends waits for the last spans


def start_tracer(endpoint: str | None) -> Tracer | None:
    """None: nothing is traced, and nothing of it imported. Raises ConfigError."""
    return None if endpoint is None else Tracer(endpoint)


class Tracer:
    def __init__(self, endpoint: str, *, timeout_s: float = EXPORT_TIMEOUT_S) -> None:
        """Raises ConfigError when the packages are not there or this is no address."""
        url = _traces_url(endpoint)
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"--otlp-endpoint needs OpenTelemetry, and {error.name} is not installed: "
                "pip install 'serverlesslora[otel]'"
            ) from error
        # It reports every batch that is lost; `_ToldOnce` says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create(
            {"service.version": serverlesslora.__version__} | ({} if named else {"service.name": "serverlesslora"})
        )
        exporter = _told_once(OTLPSpanExporter(endpoint=url, timeout=timeout_s), url)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("serverlesslora", serverlesslora.__version__)
        self._propagator = TraceContextTextMapPropagator()
        self._api = trace

    def finish(self, journal: Journal) -> None:
        """The trace of a request that is over. Never waits."""
        operation = OPERATIONS.get(journal.route)
        if operation is None:
            return
        api = self._api
        carrier = {name.decode(): value.decode("latin-1") for name, value in journal.headers if name in PROPAGATED}
        root = self._tracer.start_span(
            f"{operation} {journal.function}" if journal.function else operation,
            context=self._propagator.extract(carrier),
            kind=api.SpanKind.SERVER,
            attributes=_attributes(journal, operation),
            start_time=journal.arrived_ns,
        )
        if journal.outcome == "failed":
            root.set_status(api.StatusCode.ERROR)
        if root.is_recording():
            within = api.set_span_in_context(root)
            for name, start_s, end_s in phases(journal):
                span = self._tracer.start_span(name, context=within, start_time=_at(journal, start_s))
                span.end(_at(journal, max(start_s, end_s)))
        root.end(_at(journal, journal.ended_s or 0.0))

    async def flush(self) -> None:
        await asyncio.to_thread(self._provider.force_flush)

    async def shutdown(self) -> None:
        """Sends what is left, but does not wait long for a collector that takes nothing."""
        done = threading.Event()

        def leave() -> None:
            self._provider.shutdown()
            done.set()

        threading.Thread(target=leave, name="last spans", daemon=True).start()
        deadline = asyncio.get_running_loop().time() + LAST_EXPORT_S
        while not done.is_set() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)


def phases(journal: Journal) -> list[tuple[str, float, float]]:
    """What the request went through as (name, start, end), in seconds after its arrival."""
    found: list[tuple[str, float, float]] = []
    if journal.opened_s is None:
        return found
    until_s = journal.ended_s or journal.opened_s
    sent_s = _first(journal.sent_s, journal.started_s, until_s)
    found.append(("queue", journal.opened_s, sent_s))
    at_s = journal.opened_s
    for part, seconds in journal.cold.parts if journal.cold else ():
        if part == "adapter":  # it is loaded while the request waits for its turn
            at_s = _first(journal.placed_s, at_s)
        found.append((f"cold start: {part}", at_s, at_s + seconds))
        at_s += seconds
    if journal.first_token_s is not None:
        found.append(("prefill", sent_s, journal.first_token_s))
        found.append(("generation", journal.first_token_s, _first(journal.last_token_s, until_s)))
    return found


def _first(*times: float | None) -> float:
    return next(each for each in times if each is not None)


def _at(journal: Journal, seconds: float) -> int:
    return journal.arrived_ns + round(seconds * 1e9)


def _attributes(journal: Journal, operation: str) -> Mapping[str, Any]:
    status = journal.status or 499
    ended = status if journal.generation_status is None else journal.generation_status
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "serverlesslora",
        "gen_ai.request.model": journal.function,
        "gen_ai.response.model": journal.function,
        "gen_ai.response.finish_reasons": journal.finish_reasons or None,
        "http.request.method": "POST",
        "http.route": journal.route,
        "http.response.status_code": status,
        "error.type": str(ended) if ended >= 400 else None,
        "serverlesslora.request_id": journal.request_id,
        "serverlesslora.outcome": journal.outcome,
        "serverlesslora.tenant": journal.tenant,
        "serverlesslora.key_id": journal.key_id,
        "serverlesslora.domain": journal.domain,
        "serverlesslora.adapter": journal.digest,
        "serverlesslora.rung": journal.cold.rung if journal.cold else None,
        "serverlesslora.time_to_first_token_s": journal.first_token_s,
    }
    if journal.input_tokens:
        found |= {
            "gen_ai.usage.input_tokens": journal.input_tokens,
            "gen_ai.usage.cache_read.input_tokens": journal.cached_tokens,
            "gen_ai.usage.output_tokens": journal.output_tokens,
        }
    return {name: value for name, value in found.items() if value is not None}


def _traces_url(endpoint: str) -> str:
    """As OpenTelemetry's own variable, it names the collector; the path is added unless it is there."""
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(
            f"--otlp-endpoint {endpoint!r} is no address of a collector; it looks like http://127.0.0.1:4318"
        )
    base = endpoint.rstrip("/")
    return base if base.endswith(TRACES_PATH) else base + TRACES_PATH


def _told_once(exporter: SpanExporter, url: str) -> SpanExporter:
    """The same exporter, which says when the collector stops taking spans and when it takes them again."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    url = urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2], query="").geturl()  # as it may be told

    class ToldOnce(SpanExporter):
        is_failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = exporter.export(spans)
            is_failing = result is not SpanExportResult.SUCCESS
            if is_failing and not self.is_failing:
                log.warning("traces cannot be delivered to %s; requests are not affected", url)
            elif self.is_failing and not is_failing:
                log.warning("traces are delivered to %s again", url)
            self.is_failing = is_failing
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return exporter.force_flush(timeout_millis)

    return ToldOnce()
