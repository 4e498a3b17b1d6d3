"""The page is well-formed, counts what happened once, and cannot grow without end."""

from __future__ import annotations

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.backend import BackendStats, Cold
from serverlesslora.gateway.metrics import OTHER, Metrics
from serverlesslora_ipc.messages import Delta, Finished
from tests.backend_fake import FakeBackend
from tests.server import running
from tests.test_sse import body_of


def families(page: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(page)}


def total(family: Metric, suffix: str = "_total") -> float:
    return sum(sample.value for sample in family.samples if sample.name == family.name + suffix)


def test_the_names_that_dashboards_and_gateways_look_for() -> None:
    with running(create_app(FakeBackend())) as url:
        found = families(httpx.get(f"{url}/metrics").text)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_requests_info"):
        assert found[f"vllm:{name}"].type == "gauge"
    labels = found["vllm:lora_requests_info"].samples[0].labels
    assert labels == {"max_lora": "8", "running_lora_adapters": "upper,rot13", "waiting_lora_adapters": "cold"}
    assert found["vllm:kv_cache_usage_perc"].samples[0].value == 0.25


def test_finished_requests_are_counted_once() -> None:
    with running(create_app(FakeBackend())) as url:
        used = 0
        for number in range(4):
            body = body_of("upper", stream=bool(number % 2), max_tokens=3)
            response = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert response.status_code == 200
            used += 3
        httpx.post(f"{url}/v1/chat/completions", json=body_of("broken"))
        httpx.post(f"{url}/v1/chat/completions", json=body_of("nope"))
        found = families(httpx.get(f"{url}/metrics").text)
    assert total(found["vllm:request_success"]) == 4
    assert total(found["vllm:generation_tokens"]) == used
    assert found["vllm:request_success"].samples[0].labels == {"model_name": "upper", "finished_reason": "length"}
    outcomes = {
        (sample.labels["function"], sample.labels["status"]): sample.value
        for sample in found["serverlesslora_requests"].samples
    }
    assert outcomes == {("upper", "200"): 4, ("broken", "500"): 1}
    assert total(found["serverlesslora_time_to_first_token_seconds"], "_count") == 5
    assert total(found["vllm:e2e_request_latency_seconds"], "_count") == 4
    assert total(found["serverlesslora_inter_token_seconds"], "_count") == 4 * 2 + 1


def test_cold_starts_by_rung() -> None:
    metrics = Metrics(BackendStats, 10)
    metrics.record("f").cold(Cold("worker", (("worker", 0.02), ("adapter", 0.004))))
    metrics.record("f").cold(Cold())
    found = families(metrics.page().decode())
    rungs = {sample.labels["rung"]: sample.value for sample in found["serverlesslora_cold_starts"].samples}
    assert rungs == {"worker": 1, "hot": 1}
    assert total(found["serverlesslora_cold_start_seconds"], "_count") == 2


def test_functions_beyond_the_cap_share_a_label() -> None:
    metrics = Metrics(BackendStats, 3)
    for number in range(50):
        record = metrics.record(f"f{number}")
        record.delta(0, Delta("r", 0, "x", (1,), finish_reason="stop"))
        record.finished(Finished("r", 1, 1))
        record.close(200)
    found = families(metrics.page().decode())
    labels = {sample.labels["function"] for sample in found["serverlesslora_requests"].samples}
    assert labels == {"f0", "f1", "f2", OTHER}
    assert total(found["serverlesslora_requests"]) == 50
