"""The page is well-formed, counts what happened once, and cannot grow without end."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.backend import BackendStats, Cold, GenerationRequest
from serverlesslora.gateway.metrics import OTHER, Metrics
from serverlesslora.gateway.metrics_views import LORA_NAMES, State
from serverlesslora_ipc.messages import Delta, Finished, SamplingParams, TextPrompt
from tests.backend_fake import FakeBackend
from tests.server import running, serving
from tests.test_sse import body_of

HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
)
COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
)
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "lora_requests_info",
    "cache_config_info",
)


def families(page: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(page)}


def total(family: Metric, suffix: str = "_total") -> float:
    return sum(sample.value for sample in family.samples if sample.name == family.name + suffix)


def by_label(family: Metric, label: str, suffix: str = "") -> dict[str, float]:
    return {s.labels[label]: s.value for s in family.samples if s.name == family.name + suffix}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving("--demo") as url:
        yield url


def test_the_names_that_dashboards_and_gateways_look_for() -> None:
    with running(create_app(FakeBackend())) as url:
        found = families(httpx.get(f"{url}/metrics").text)
    for kind, names in (("gauge", GAUGES), ("counter", COUNTERS), ("histogram", HISTOGRAMS)):
        assert {found[f"vllm:{name}"].type for name in names} == {kind}
    labels = found["vllm:lora_requests_info"].samples[0].labels
    assert labels == {"max_lora": "8", "running_lora_adapters": "upper,rot13", "waiting_lora_adapters": "cold"}
    assert found["vllm:kv_cache_usage_perc"].samples[0].value == 0.25


def test_a_label_does_not_list_thousands_of_adapters() -> None:
    names = tuple(f"function-{number}" for number in range(5000))
    stats = BackendStats(max_adapters=5000, running_adapters=names, waiting_adapters=names)
    (info,) = [each for each in State(lambda: stats).collect() if each.name == "vllm:lora_requests_info"]
    labels = info.samples[0].labels
    assert labels["max_lora"] == "5000"
    assert labels["running_lora_adapters"].split(",") == list(names[:LORA_NAMES])
    assert labels["waiting_lora_adapters"].split(",") == list(names[:LORA_NAMES])


def test_openmetrics_for_who_asks_for_it() -> None:
    with running(create_app(FakeBackend())) as url:
        httpx.post(f"{url}/v1/chat/completions", json=body_of("upper", max_tokens=3))
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        answer = httpx.get(f"{url}/metrics", headers={"accept": accept})
        plain = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {family.name: family for family in openmetrics.text_string_to_metric_families(answer.text)}  # type: ignore[no-untyped-call]
    assert found.keys() == families(plain.text).keys()
    assert total(found["vllm:generation_tokens"]) == 3


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_finished_requests_and_their_usage_are_what_grew(real: bool, request: pytest.FixtureRequest) -> None:
    def check(url: str) -> None:
        before = families(httpx.get(f"{url}/metrics").text)
        used = prompts = 0
        for number, max_tokens in enumerate((3, 5, 2)):
            body = body_of("reverse", max_tokens=max_tokens, temperature=0, n=1 + number % 2)
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            used += answer.json()["usage"]["completion_tokens"]
            prompts += answer.json()["usage"]["prompt_tokens"]
        after = families(httpx.get(f"{url}/metrics").text)

        def grew(name: str, suffix: str = "_total") -> float:
            return total(after[f"vllm:{name}"], suffix) - total(before[f"vllm:{name}"], suffix)

        assert grew("request_success") == 3
        assert grew("generation_tokens") == used == grew("request_generation_tokens", "_sum")
        assert grew("prompt_tokens") == prompts == grew("request_prompt_tokens", "_sum")
        assert grew("e2e_request_latency_seconds", "_count") == 3
        assert grew("request_params_max_tokens", "_sum") == 10
        assert grew("request_params_n", "_sum") == 4
        assert set(by_label(after["vllm:request_success"], "finished_reason", "_total")) <= {"stop", "length"}
        if real:
            assert grew("request_prefill_time_seconds", "_count") == 3
            assert grew("request_inference_time_seconds", "_sum") > 0
            assert grew("prefix_cache_queries") > 0

    if real:
        check(request.getfixturevalue("server"))
    else:
        with running(create_app(FakeBackend())) as url:
            check(url)


def test_what_a_real_server_holds_and_spends(server: str) -> None:
    answer = httpx.post(f"{server}/v1/chat/completions", json=body_of("upper", max_tokens=4), timeout=60)
    assert answer.status_code == 200
    found = families(httpx.get(f"{server}/metrics").text)
    memory = by_label(found["serverlesslora_memory_bytes"], "kind")
    assert memory["backbone"] > 0 and memory["adapter"] > 0 and memory["worker"] > 0
    assert by_label(found["serverlesslora_workers"], "state")["serving"] >= 1
    info = found["vllm:lora_requests_info"].samples[0]
    assert "upper" in info.labels["running_lora_adapters"].split(",")
    assert info.labels["max_lora"] == "6"
    cache = found["vllm:cache_config_info"].samples[0]
    assert cache.value == 1 and int(cache.labels["num_gpu_blocks"]) > 0 and cache.labels["block_size"] == "16"
    spent = [s for s in found["serverlesslora_cost"].samples if s.labels == {"function": "upper", "part": "device"}]
    assert spent[0].value > 0
    assert found["serverlesslora_price_info"].samples[0].labels["currency"] == "USD"
    assert "function" in by_label(found["serverlesslora_domain_requests_running"], "kind")


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
    assert total(found["vllm:request_time_per_output_token_seconds"], "_count") == 4


def test_every_prompt_of_a_call_is_one_finished_request() -> None:
    metrics = Metrics(BackendStats, 10)
    record = metrics.record("f")
    for prompt, name in enumerate("ab"):
        record.delta(prompt, Delta(name, 0, "x", (1,)))
    record.delta(1, Delta("b", 0, "y", (1,), finish_reason="length"))
    record.finished(Finished("b", 4, 2, first_token_s=0.3, queue_s=0.1))
    record.delta(0, Delta("a", 0, "y", (1,), finish_reason="stop"))
    record.finished(Finished("a", 5, 2))
    record.close(200)
    found = families(metrics.page().decode())
    assert by_label(found["vllm:request_success"], "finished_reason", "_total") == {"length": 1, "stop": 1}
    assert total(found["vllm:time_to_first_token_seconds"], "_count") == 1
    assert total(found["vllm:request_prefill_time_seconds"], "_count") == 1
    assert total(found["vllm:request_prefill_time_seconds"], "_sum") == pytest.approx(0.2)
    hour = metrics.history.summary(("f", None))
    assert hour is not None and hour.tokens == 4


def test_a_prompt_that_is_only_echoed_has_no_first_token() -> None:
    metrics = Metrics(BackendStats, 10)
    record = metrics.record("f")
    record.delta(0, Delta("a", 0, "", finish_reason="length"))
    record.finished(Finished("a", 5, 0))
    record.close(200)
    found = families(metrics.page().decode())
    assert by_label(found["vllm:request_success"], "finished_reason", "_total") == {"length": 1}
    for name in ("time_to_first_token", "request_prefill_time", "request_decode_time", "inter_token_latency"):
        assert total(found[f"vllm:{name}_seconds"], "_count") == 0, name
    assert total(found["vllm:e2e_request_latency_seconds"], "_count") == 1


def test_cold_starts_by_rung() -> None:
    metrics = Metrics(BackendStats, 10)
    metrics.record("f").cold(Cold("worker", (("worker", 0.02), ("adapter", 0.004))))
    metrics.record("f").cold(Cold())
    found = families(metrics.page().decode())
    assert by_label(found["serverlesslora_cold_starts"], "rung", "_total") == {"worker": 1, "hot": 1}
    assert total(found["serverlesslora_cold_start_seconds"], "_count") == 2
    hour = metrics.history.summary(("f", None))
    assert hour is not None
    count, seconds = hour.colds["worker"]
    assert count == 1 and seconds == pytest.approx(0.024, rel=0.06)


def test_functions_beyond_the_cap_share_a_label() -> None:
    metrics = Metrics(BackendStats, 3)
    for number in range(50):
        asked = GenerationRequest("r", f"f{number}", TextPrompt("x"), SamplingParams(max_tokens=1))
        metrics.asked(f"f{number}", [asked])
        record = metrics.record(f"f{number}")
        record.delta(0, Delta("r", 0, "x", (1,), finish_reason="stop"))
        record.finished(Finished("r", 1, 1))
        record.close(200)
        metrics.spent(f"f{number}", None, 1.0, None)
    metrics.held("", None, "backbone", 5.0, 0.5)
    found = families(metrics.page().decode())
    labels = {sample.labels["function"] for sample in found["serverlesslora_requests"].samples}
    assert labels == {"f0", "f1", "f2", OTHER}
    assert total(found["serverlesslora_requests"]) == 50
    parts = {(s.labels["function"], s.labels["part"]): s.value for s in found["serverlesslora_cost"].samples}
    assert parts[OTHER, "device"] == 47 and parts["", "memory"] == 0.5
    assert metrics.history.total()[0].cost == 50.5


def test_the_adapters_info_is_dated_by_its_last_change() -> None:
    now = 100.0
    hot: tuple[str, ...] = ()
    state = State(lambda: BackendStats(running_adapters=hot), wall_clock=lambda: now)

    def reading() -> tuple[str, float]:
        samples = [s for family in state.collect() for s in family.samples if s.name == "vllm:lora_requests_info"]
        assert len(samples) == 1
        return samples[0].labels["running_lora_adapters"], samples[0].value

    assert reading() == ("", 100)
    now, hot = 200.0, ("a", "b")
    assert reading() == ("a,b", 200)
    now = 300.0
    assert reading() == ("a,b", 200)
