"""Traces as a collector gets them: one per request, its phases in order, no text; and no collector, no harm."""

from __future__ import annotations

import gzip
import http.server
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from serverlesslora.errors import ConfigError
from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.backend import Cold
from serverlesslora.gateway.journal import Journal
from serverlesslora.gateway.tracing import Tracer, phases, start_tracer
from tests.backend_fake import FakeBackend
from tests.live import live
from tests.server import ROOT, free_port, running, wait_until
from tests.test_sse import Served, body_of, connect, leave, read_until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Collector:
    """Decodes what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.paths: set[str] = set()
        self.raw = b""
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def take(self, path: str, body: bytes) -> None:
        message = ExportTraceServiceRequest.FromString(body)
        self.paths.add(path)
        self.raw += body
        for resource in message.resource_spans:
            self.resources.append(values(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def values(attributes: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        found = getattr(value, kind)
        return [plain(each) for each in found.values] if kind == "array_value" else found

    return {each.key: plain(each.value) for each in attributes}


class Traced(NamedTuple):
    served: Served
    collector: Collector
    tracer: Tracer

    def spans(self, number: int) -> list[Span]:
        self.tracer._provider.force_flush()
        wait_until(lambda: len(self.collector.spans) >= number)
        return self.collector.spans


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture
def traced(collector: Collector) -> Iterator[Traced]:
    backend = FakeBackend()
    app = create_app(backend)
    tracer = start_tracer(collector.url)
    assert tracer is not None
    app.state.gateway.on_finished = tracer.finish
    with running(app) as url:
        yield Traced(Served(backend, url), collector, tracer)
    tracer._provider.shutdown()


def ask(traced: Traced, model: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    url = f"{traced.served.url}/v1/chat/completions"
    return httpx.post(url, json=body_of(model, **fields), headers=headers, timeout=10)


def test_one_request_is_one_trace(traced: Traced) -> None:
    usage = ask(traced, "upper", {"x-request-id": "my-request"}).json()["usage"]
    spans = {span.name: span for span in traced.spans(4)}
    assert spans.keys() == {"chat upper", "queue", "prefill", "generation"}
    root = spans.pop("chat upper")
    assert root.kind == Span.SPAN_KIND_SERVER
    assert {span.trace_id for span in spans.values()} == {root.trace_id}
    assert {span.parent_span_id for span in spans.values()} == {root.span_id}
    found = values(root.attributes)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == "upper"
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert found["http.response.status_code"] == 200
    assert found["serverlesslora.request_id"] == "my-request"
    assert "error.type" not in found
    queue, prefill, generation = spans["queue"], spans["prefill"], spans["generation"]
    assert root.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert queue.end_time_unix_nano <= prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == generation.start_time_unix_nano
    assert generation.end_time_unix_nano <= root.end_time_unix_nano
    assert traced.collector.paths == {"/v1/traces"}
    assert traced.collector.resources[0]["service.name"] == "serverlesslora"


def test_the_clients_trace_goes_on(traced: Traced) -> None:
    ask(traced, "upper", {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"})
    (root,) = [span for span in traced.spans(4) if span.name == "chat upper"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert root.trace_state == "vendor=1"


def test_a_client_that_does_not_sample_is_not_traced(traced: Traced) -> None:
    ask(traced, "upper", {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"})
    ask(traced, "reverse", {"traceparent": "rubbish"})
    assert {span.name for span in traced.spans(4)} == {"chat reverse", "queue", "prefill", "generation"}


def test_parts_of_a_cold_start(traced: Traced) -> None:
    connection = connect(traced.served, "cold")
    wait_until(lambda: traced.served.backend.running == 1)
    traced.served.backend.thaw_from_outside()
    read_until(connection, b'"usage"')
    connection.close()
    spans = {span.name: span for span in traced.spans(6)}
    worker, adapter = spans["cold start: worker"], spans["cold start: adapter"]
    assert worker.end_time_unix_nano - worker.start_time_unix_nano == pytest.approx(12.3e6, rel=0.01)
    assert adapter.end_time_unix_nano - adapter.start_time_unix_nano == pytest.approx(4.5e6, rel=0.01)
    assert values(spans["chat cold"].attributes)["serverlesslora.rung"] == "worker"


def test_phases_of_a_real_climb() -> None:
    journal = Journal("r")
    journal.cold = Cold("backbone", (("backbone", 2.0), ("worker", 1.0), ("adapter", 0.5)))
    journal.opened_s, journal.placed_s, journal.sent_s = 0.1, 3.1, 3.2
    journal.first_token_s, journal.last_token_s, journal.ended_s = 4.0, 5.0, 5.1
    assert [(name, round(start, 3), round(end, 3)) for name, start, end in phases(journal)] == [
        ("queue", 0.1, 3.2),
        ("cold start: backbone", 0.1, 2.1),
        ("cold start: worker", 2.1, 3.1),
        ("cold start: adapter", 3.1, 3.6),
        ("prefill", 3.2, 4.0),
        ("generation", 4.0, 5.0),
    ]


def test_requests_that_go_wrong(traced: Traced) -> None:
    assert ask(traced, "busy").status_code == 503
    connection = connect(traced.served, "slow", stream=True)
    read_until(connection, b'"content":"H"')
    leave(connection)
    spans = {span.name: values(span.attributes) for span in traced.spans(5)}
    assert (spans["chat busy"]["error.type"], spans["chat busy"]["serverlesslora.outcome"]) == ("503", "refused")
    assert (spans["chat slow"]["error.type"], spans["chat slow"]["serverlesslora.outcome"]) == ("499", "aborted")


def test_nothing_that_was_said_is_in_a_trace(traced: Traced) -> None:
    body = {"model": "upper", "prompt": "canary", "user": "canary", "stop": ["canary!"], "temperature": 0}
    headers = {"authorization": "Bearer canary", "x-canary": "canary", "user-agent": "canary"}
    httpx.post(f"{traced.served.url}/v1/completions?canary=canary", json=body, headers=headers)
    ask(traced, "canary")
    names = {span.name for span in traced.spans(5)}
    assert {"text_completion upper", "chat"} <= names
    assert b"text_completion" in traced.collector.raw
    assert b"canary" not in traced.collector.raw.lower()


def test_a_dead_collector_harms_nobody_and_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer(f"http://127.0.0.1:{free_port()}", timeout_s=0.2)
    app = create_app(FakeBackend())
    app.state.gateway.on_finished = tracer.finish
    with caplog.at_level(logging.DEBUG), running(app) as url:
        for _ in range(3):
            for _ in range(5):
                assert httpx.post(f"{url}/v1/chat/completions", json=body_of("upper")).status_code == 200
            tracer._provider.force_flush()
    said = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(("opentelemetry", "serverlesslora.tracing"))
    ]
    assert len([each for each in said if "cannot be delivered" in each]) == 1
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]
    tracer._provider.shutdown()


@pytest.mark.parametrize(
    "endpoint", ["", "collector", "ftp://x", "http://", "http://x:99999", "http://[", "localhost:4318"]
)
def test_bad_addresses(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="it looks like http://127"):
        start_tracer(endpoint)


def test_without_the_packages_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'serverlesslora\[otel\]'"):
        start_tracer("http://127.0.0.1:4318")


def test_without_the_flag_nothing_of_it_is_imported() -> None:
    code = "import serverlesslora.cli.main, sys; from serverlesslora.gateway.tracing import start_tracer as s; s(None)"
    code += "; print([name for name in sys.modules if name.startswith(('opentelemetry', 'google.protobuf'))])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_the_real_server_traces_a_cold_start(collector: Collector) -> None:
    with live("--demo", "--otlp-endpoint", collector.url) as server:
        server.answer("upper", "hello")
        server.process.terminate()
        assert server.process.wait(20) == 0  # the last spans are sent before it ends
    spans = {span.name: span for span in collector.spans}
    assert {"chat upper", "queue", "prefill", "generation", "cold start: worker"} <= spans.keys()
    root = values(spans["chat upper"].attributes)
    assert root["serverlesslora.domain"] == "demo/function:upper"
    assert len(root["serverlesslora.adapter"]) == 64
    assert root["serverlesslora.time_to_first_token_s"] > 0
    assert json.dumps(root)
