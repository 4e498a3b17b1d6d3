"""The numbered checks that need a server of their own: keys, a full queue, and the numbers on /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from serverlesslora.demo import TASKS
from serverlesslora.tenancy.key import Grant
from serverlesslora.tenancy.store import KEYS_FILE, KeyStore
from tests.live import Live, live
from tests.server import wait_until

TEXT = "hello world"
QUEUE = 4


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live("--demo", "--max-queue", str(QUEUE), "--log-level", "debug") as running:
        yield running


def store_of(server: Live) -> KeyStore:
    return KeyStore(server.log.parent / "state" / KEYS_FILE)


def families(server: Live) -> dict[str, Metric]:
    page = httpx.get(f"{server.url}/metrics", timeout=10).text
    return {family.name: family for family in text_string_to_metric_families(page)}


def total(server: Live, family: str) -> float:
    """Over all labels, of a counter."""
    found = families(server).get(family)
    return sum(each.value for each in found.samples if each.name == f"{family}_total") if found else 0.0


def test_a50_a_full_queue_refuses_the_surplus(server: Live) -> None:
    def ask(number: int) -> httpx.Response:
        # Sixty tokens each, so that all of them are open at once.
        return server.chat(
            "upper", "the quick brown fox jumps over it"[: 20 + number % 5], max_tokens=60, min_tokens=60
        )

    assert server.answer("upper", TEXT) == TASKS["upper"](TEXT)
    with ThreadPoolExecutor(6 * QUEUE) as pool:
        answers = list(pool.map(ask, range(6 * QUEUE)))
    accepted = [each for each in answers if each.status_code == 200]
    refused = [each for each in answers if each.status_code != 200]
    assert len(accepted) >= QUEUE
    assert refused
    for each in accepted:
        assert each.json()["usage"]["completion_tokens"] == 60
    for each in refused:
        assert each.status_code in (429, 503)
        assert 1 <= int(each.headers["retry-after"]) <= 60
        assert set(each.json()["error"]) == {"message", "type", "param", "code"}


def test_a57_gauges_of_a_model_server(server: Live) -> None:
    found = families(server)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_requests_info"):
        assert found[f"vllm:{name}"].type == "gauge"
    info = found["vllm:lora_requests_info"].samples
    assert info
    for sample in info:
        assert set(sample.labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert 0 <= found["vllm:kv_cache_usage_perc"].samples[0].value <= 1


def test_a58_counters_grow_by_what_was_done(server: Live) -> None:
    requests, tokens = total(server, "vllm:request_success"), total(server, "vllm:generation_tokens")
    answers = [server.chat(name, TEXT).json() for name in ("upper", "reverse", "demo", "upper", "reverse")]
    used = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert total(server, "vllm:request_success") - requests == len(answers)
    assert total(server, "vllm:generation_tokens") - tokens == used


def test_a48_no_key_no_answer(server: Live) -> None:
    """From here on this server needs keys."""
    store_of(server).create(Grant(admin=True))
    wait_until(lambda: server.chat("upper", TEXT).status_code == 401)
    refused = server.chat("upper", TEXT)
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200


def test_a49_a_key_opens_and_is_never_told(server: Live) -> None:
    key = store_of(server).create(Grant(admin=True)).text
    wrong = key[:-4] + "AAAA"

    def ask(bearer: str, model: str = "upper") -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": TEXT}], "temperature": 0}
        headers = {"authorization": f"Bearer {bearer}"}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    wait_until(lambda: ask(key).status_code == 200)
    assert ask(key).json()["choices"][0]["message"]["content"] == TASKS["upper"](TEXT)
    refusals = [ask(wrong), ask(key, "nope"), ask(f"{key} {key}")]
    assert [each.status_code for each in refusals] == [401, 404, 401]
    for text in [*(each.text for each in refusals), server.log.read_text(errors="replace")]:
        assert key not in text
        assert wrong not in text
