"""The API contract, one test per numbered check, against a base URL.

The same tests run against the fake backend, against a real server with the embedded demo, and against whatever
SERVERLESSLORA_TEST_URL names (with SERVERLESSLORA_TEST_ADAPTER as an adapter directory that server can read).
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serverlesslora.demo import ADAPTER_NAMES, adapter_paths
from serverlesslora.gateway.app import create_app
from tests.backend_fake import FakeBackend
from tests.server import Target, running, serving

BASE, A1, A2 = "demo", "upper", "reverse"
TEXT = "hello world"

Json = dict[str, Any]

NO_PROMPTS: tuple[Any, ...] = ([], [-1], [[]], [1.5], [True], [["x"]], 7)


@pytest.fixture(scope="session", params=["fake", "server"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    if request.param == "fake":
        adapter = tmp_path_factory.mktemp("adapters") / "upper"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        with running(create_app(FakeBackend())) as url:
            yield Target(url, str(adapter))
    elif url := os.environ.get("SERVERLESSLORA_TEST_URL", ""):
        yield Target(url.rstrip("/"), os.environ.get("SERVERLESSLORA_TEST_ADAPTER", ""))
    else:
        with serving() as url:
            yield Target(url, str(adapter_paths()["upper"]))


@pytest.fixture(scope="session")
def client(target: Target) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=target.url, timeout=60.0) as client:
        yield client


def ask(client: httpx.Client, model: str = A1, content: Any = TEXT, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": content}], **fields}
    return client.post("/v1/chat/completions", json=body)


def chat(client: httpx.Client, model: str = A1, content: Any = TEXT, **fields: Any) -> Json:
    response = ask(client, model, content, **fields)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def said(client: httpx.Client, model: str = A1, content: Any = TEXT, **fields: Any) -> str:
    text = chat(client, model, content, temperature=0, **fields)["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def complete(client: httpx.Client, prompt: Any, model: str = A1, **fields: Any) -> Json:
    response = client.post("/v1/completions", json={"model": model, "prompt": prompt, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def stream(client: httpx.Client, model: str = A1, content: Any = TEXT, **fields: Any) -> list[Json]:
    response = ask(client, model, content, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    return chunks_of(response.text)


def chunks_of(text: str) -> list[Json]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def joined(chunks: list[Json], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def error_of(response: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> Json:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: Json = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error


# --- models ------------------------------------------------------------------------------------------------------


def test_a01_models_are_listed_once(client: httpx.Client) -> None:
    body = client.get("/v1/models").raise_for_status().json()
    assert body["object"] == "list"
    names = [card["id"] for card in body["data"]]
    assert len(names) == len(set(names))
    assert {BASE, *ADAPTER_NAMES} <= set(names)
    for card in body["data"]:
        assert card["object"] == "model"
        assert type(card["created"]) is int
        assert isinstance(card["owned_by"], str)


def test_a02_adapter_cards_name_their_base(client: httpx.Client) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert cards[BASE]["parent"] is None
    for name in ADAPTER_NAMES:
        assert cards[name]["parent"] == BASE
        assert cards[name]["root"]


def test_a03_one_model(client: httpx.Client) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert client.get(f"/v1/models/{A1}").raise_for_status().json() == cards[A1]
    error_of(client.get("/v1/models/nope"), 404, code="model_not_found")


# --- chat --------------------------------------------------------------------------------------------------------


def test_a04_chat_shape(client: httpx.Client) -> None:
    body = chat(client)
    assert isinstance(body["id"], str)
    assert body["object"] == "chat.completion"
    assert type(body["created"]) is int
    assert body["model"] == A1
    (choice,) = body["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["logprobs"] is None


def test_a05_usage_adds_up(client: httpx.Client) -> None:
    usages = [chat(client, temperature=0)["usage"] for _ in range(3)]
    for usage in usages:
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert min(usage["total_tokens"], usage["prompt_tokens"], usage["completion_tokens"]) > 0
    assert len({usage["prompt_tokens"] for usage in usages}) == 1


def test_a06_one_token(client: httpx.Client) -> None:
    body = chat(client, max_tokens=1)
    assert body["usage"]["completion_tokens"] == 1
    assert body["choices"][0]["finish_reason"] == "length"


def test_a07_max_completion_tokens_wins(client: httpx.Client) -> None:
    assert chat(client, max_completion_tokens=3)["usage"]["completion_tokens"] <= 3
    assert chat(client, max_completion_tokens=3, max_tokens=9, temperature=0)["usage"]["completion_tokens"] == 3


def test_a08_stop_string(client: httpx.Client) -> None:
    whole = said(client)
    stop = whole[3:6]
    body = chat(client, temperature=0, stop=stop)
    assert body["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a09_several_choices(client: httpx.Client) -> None:
    body = chat(client, n=3, temperature=1, return_token_ids=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in body["choices"])


def test_a10_greedy_repeats(client: httpx.Client) -> None:
    assert said(client) == said(client)


def test_a11_seeds(client: httpx.Client) -> None:
    def with_seed(seed: int, temperature: float = 1.0) -> str:
        body = chat(client, BASE, "a B 3 $ zz ?", seed=seed, temperature=temperature, max_tokens=24, ignore_eos=True)
        return str(body["choices"][0]["message"]["content"])

    assert with_seed(7) == with_seed(7)
    # The demo is very sure of itself at temperature 1; seeds show at 2.
    assert len({with_seed(seed, 2.0) for seed in range(1, 6)}) > 1


def test_a12_content_parts(client: httpx.Client) -> None:
    assert said(client, content=[{"type": "text", "text": TEXT}]) == said(client)


def test_a13_logprobs(client: httpx.Client) -> None:
    body = chat(client, temperature=0, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == body["usage"]["completion_tokens"]
    for token in content:
        assert isinstance(token["token"], str)
        assert token["logprob"] <= 0
        assert isinstance(token["bytes"], list)
        tops = [top["logprob"] for top in token["top_logprobs"]]
        assert len(tops) == 2
        assert tops == sorted(tops, reverse=True)
        assert token["logprob"] == tops[0]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a14_instructions(client: httpx.Client, role: str) -> None:
    messages = [{"role": role, "content": "be brief"}, {"role": "user", "content": TEXT}]
    response = client.post("/v1/chat/completions", json={"model": A1, "messages": messages, "max_tokens": 4})
    assert response.status_code == 200


def test_a15_penalties(client: httpx.Client) -> None:
    chat(client, frequency_penalty=1.5, presence_penalty=-1)


def test_a16_logit_bias(client: httpx.Client) -> None:
    first = chat(client, temperature=0, max_tokens=1, return_token_ids=True)["choices"][0]["token_ids"][0]
    body = chat(client, temperature=0, max_tokens=1, return_token_ids=True, logit_bias={str(first): -100})
    assert body["choices"][0]["token_ids"][0] != first


# --- text completions --------------------------------------------------------------------------------------------


def test_a17_completion_shape(client: httpx.Client) -> None:
    body = complete(client, TEXT)
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    assert isinstance(choice["text"], str)
    assert choice["finish_reason"] in ("stop", "length")
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


def test_a18_sixteen_tokens_by_default(client: httpx.Client) -> None:
    assert complete(client, TEXT * 3)["usage"]["completion_tokens"] <= 16
    assert complete(client, TEXT * 3, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_a19_several_prompts(client: httpx.Client) -> None:
    prompts = ["first one", "and the second"]
    both = complete(client, prompts)["choices"]
    assert [choice["index"] for choice in both] == [0, 1]
    assert [choice["text"] for choice in both] == [complete(client, each)["choices"][0]["text"] for each in prompts]


def test_a20_token_ids(client: httpx.Client) -> None:
    by_text = complete(client, TEXT, return_token_ids=True)["choices"][0]
    ids = by_text["prompt_token_ids"]
    assert complete(client, ids)["choices"][0]["text"] == by_text["text"]
    assert complete(client, [ids])["choices"][0]["text"] == by_text["text"]


def test_a21_echo_with_logprobs(client: httpx.Client) -> None:
    body = complete(client, TEXT, echo=True, logprobs=1, max_tokens=1)
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    count = body["usage"]["prompt_tokens"] + 1
    assert {len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {count}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(each <= 0 for each in logprobs["token_logprobs"][1:])
    assert all(
        logprob <= max(top.values()) and logprob in top.values()
        for logprob, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
    )
    assert choice["text"].startswith(TEXT)
    nothing_more = complete(client, TEXT, echo=True, logprobs=1, max_tokens=0)
    assert nothing_more["choices"][0]["text"] == TEXT
    again = nothing_more["choices"][0]["logprobs"]["token_logprobs"]
    assert again[1:] == pytest.approx(logprobs["token_logprobs"][1:-1], abs=1e-3)


def test_a22_adapters_judge_differently(client: httpx.Client) -> None:
    def echoed(model: str) -> list[float]:
        choice = complete(client, TEXT, model, echo=True, logprobs=1, max_tokens=1)["choices"][0]
        values: list[float] = choice["logprobs"]["token_logprobs"][1:]
        return values

    assert echoed(A1) != echoed(BASE)
    assert echoed(A1) == pytest.approx(echoed(A1), abs=1e-3)


# --- streams -----------------------------------------------------------------------------------------------------


def test_a23_event_stream(client: httpx.Client) -> None:
    response = ask(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith(("data: ", ":")) and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"


def test_a24_chunks_belong_together(client: httpx.Client) -> None:
    chunks = stream(client)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["model"] == A1


def test_a25_one_finish_reason_at_the_end(client: httpx.Client) -> None:
    for number in (1, 2):
        chunks = stream(client, n=number)
        for index in range(number):
            mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert [choice["finish_reason"] is not None for choice in mine] == [False] * (len(mine) - 1) + [True]


def test_a26_usage_chunk(client: httpx.Client) -> None:
    *chunks, last = stream(client, temperature=0, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    whole = chat(client, temperature=0)["usage"]
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][key] == whole[key]


def test_a27_no_usage_unless_asked(client: httpx.Client) -> None:
    assert all("usage" not in chunk for chunk in stream(client))


def test_a28_stream_equals_whole(client: httpx.Client) -> None:
    content = "naïve 日本語 🙂👩‍🚀 done"
    whole = said(client, BASE, content)
    chunks = stream(client, BASE, content, temperature=0)
    assert joined(chunks) == whole
    halves = [
        chunk for chunk in chunks for choice in chunk["choices"] if "\ufffd" in choice["delta"].get("content", "")
    ]
    assert not halves or "\ufffd" in whole


def test_a29_choices_of_a_stream(client: httpx.Client) -> None:
    chunks = stream(client, n=2, temperature=1)
    finished = [
        choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"] is not None
    ]
    assert sorted(finished) == [0, 1]
    assert all(joined(chunks, index) for index in (0, 1))


def test_a30_errors_come_before_the_stream(client: httpx.Client) -> None:
    error_of(ask(client, temperature=9, stream=True), 400, param="temperature")
    error_of(ask(client, max_tokens=10**6, stream=True), 400, code="context_length_exceeded")


# --- validation --------------------------------------------------------------------------------------------------


def test_a31_messages_are_required(client: httpx.Client) -> None:
    error_of(client.post("/v1/chat/completions", json={"model": A1}), 400, param="messages")
    error_of(client.post("/v1/chat/completions", json={"model": A1, "messages": []}), 400, param="messages")


def refused(client: httpx.Client, param: str, *values: Any) -> None:
    for value in values:
        error_of(ask(client, **{param: value}), 400, param=param)
        body = {"model": A1, "prompt": TEXT, param: value}
        error_of(client.post("/v1/completions", json=body), 400, param=param)


def test_a32_temperature(client: httpx.Client) -> None:
    refused(client, "temperature", 2.1, -0.1)


def test_a33_top_p(client: httpx.Client) -> None:
    refused(client, "top_p", 1.5, -0.1)


def test_a34_n(client: httpx.Client) -> None:
    refused(client, "n", 0, 129)


def test_a35_max_tokens(client: httpx.Client) -> None:
    refused(client, "max_tokens", -1, "abc")


def test_a36_context_length(client: httpx.Client) -> None:
    limit = client.get(f"/v1/models/{A1}").json()["max_model_len"]
    error = error_of(ask(client, max_tokens=limit), 400, code="context_length_exceeded")
    requested = [int(number) for number in re.findall(r"\d+", error["message"])]
    assert limit in requested
    assert any(number > limit for number in requested)
    chat(client, max_tokens=2)


def test_a37_stream_options_need_a_stream(client: httpx.Client) -> None:
    error_of(ask(client, stream_options={"include_usage": True}), 400, param="stream_options")


def test_a38_top_logprobs(client: httpx.Client) -> None:
    error_of(ask(client, top_logprobs=2), 400, param="top_logprobs")
    error_of(ask(client, logprobs=True, top_logprobs=21), 400, param="top_logprobs")


def test_a39_stop_strings(client: httpx.Client) -> None:
    error_of(ask(client, stop=["1", "2", "3", "4", "5"]), 400, param="stop")
    chat(client, stop=["1", "2", "3", "4"])


# --- errors and transport ----------------------------------------------------------------------------------------


def post_raw(client: httpx.Client, body: bytes, content_type: str = "application/json") -> httpx.Response:
    return client.post("/v1/chat/completions", content=body, headers={"content-type": content_type})


def test_a40_malformed_json(client: httpx.Client) -> None:
    assert error_of(post_raw(client, b"{bad"), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"null", b"3", b"", b"[" * 100_000, b"9" * 5000, b"\xff", b"1e999"])
def test_a41_json_that_is_no_object(client: httpx.Client, body: bytes) -> None:
    error_of(post_raw(client, body), 400)


def test_a42_unknown_model(client: httpx.Client, target: Target) -> None:
    error_of(ask(client, "nope"), 404, code="model_not_found", param="model")
    with openai.OpenAI(base_url=f"{target.url}/v1", api_key="x", max_retries=2) as sdk:
        before = count_responses(client, "404")
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
        assert count_responses(client, "404") == before + 1


def count_responses(client: httpx.Client, status: str) -> float:
    page = client.get("/metrics").text
    pattern = rf'^serverlesslora_http_responses_total{{route="/v1/chat/completions",status="{status}"}} (\S+)$'
    return sum(float(value) for value in re.findall(pattern, page, re.MULTILINE))


def test_a43_wrong_method(client: httpx.Client) -> None:
    response = client.get("/v1/chat/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_a44_unknown_path(client: httpx.Client) -> None:
    error_of(client.post("/v1/nope", json={}), 404)
    error_of(client.get("/nope"), 404)


def test_a45_wrong_content_type(client: httpx.Client) -> None:
    body = json.dumps({"model": A1, "messages": [{"role": "user", "content": TEXT}]}).encode()
    response = post_raw(client, body, "text/plain")
    assert response.status_code in (400, 415)
    error_of(response, response.status_code)


def test_a46_lone_surrogate(client: httpx.Client) -> None:
    for text in (rb"\ud800", rb"x\udc00y", rb"\ud800\ud800", rb"\udfff\ud800"):
        response = post_raw(client, b'{"model":"upper","messages":[{"role":"user","content":"%b"}]}' % text)
        error_of(response, 400)
        response = post_raw(client, b'{"model":"%b","messages":[{"role":"user","content":"x"}]}' % text)
        error_of(response, 400)
    chat(client, max_tokens=1)


def test_a47_every_error_is_an_error_object(client: httpx.Client) -> None:
    bodies: list[Json] = [
        {"model": "../../etc/passwd", "messages": [{"role": "user", "content": "x"}]},
        {"model": A1, "messages": "x"},
        {"model": A1, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"model": A1, "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        {"model": A1, "messages": [{"role": "user", "content": "x"}], "logit_bias": {"x": 1}},
        {"model": A1, "messages": [{"role": "user", "content": "x"}], "seed": 2**70},
        {"model": 3, "messages": [{"role": "user", "content": "x"}]},
        {"model": A1, "messages": [{"role": "user", "content": "x"}], "stop": ["x" * 10**6]},
        {"model": A1, "messages": [{"role": "x" * 10**6, "content": "x"}]},
    ]
    responses = [client.post("/v1/chat/completions", json=body) for body in bodies]
    responses += [client.post("/v1/load_lora_adapter", json={"lora_name": "y", "lora_path": "/no/such/folder"})]
    responses += [client.post("/v1/completions", json={"model": A1, "prompt": prompt}) for prompt in NO_PROMPTS]
    for response in responses:
        error = error_of(response, response.status_code)
        assert 400 <= response.status_code < 500
        assert len(response.content) < 8192
        assert "Traceback" not in error["message"]
        assert "/serverlesslora/" not in error["message"]
        assert "site-packages" not in error["message"]
        assert response.headers["x-should-retry"] == "false"


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(client: httpx.Client, target: Target) -> Iterator[str]:
    """A name that is loaded now and gone afterwards."""
    name = "extra/one"
    response = load(client, name, target.adapter_path)
    assert response.status_code == 200, response.text
    yield name
    client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def load(client: httpx.Client, name: str, path: str, **fields: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def unload(client: httpx.Client, name: str) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_a51_load_an_adapter(client: httpx.Client, target: Target) -> None:
    response = load(client, "X", target.adapter_path)
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'X' added successfully."
    assert "X" in [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert said(client, "X") == said(client, "upper") == TEXT.upper()
    assert unload(client, "X").status_code == 200


def test_a52_load_again(client: httpx.Client, target: Target, loaded: str) -> None:
    error = error_of(load(client, loaded, target.adapter_path), 400)
    assert "already been loaded" in error["message"]
    assert load(client, loaded, target.adapter_path, load_inplace=True).status_code == 200
    assert said(client, loaded) == TEXT.upper()


def test_a53_load_needs_a_name_and_a_path(client: httpx.Client, target: Target) -> None:
    for body in ({"lora_name": "Y"}, {"lora_name": "", "lora_path": target.adapter_path}, {"lora_name": 3}):
        error_of(client.post("/v1/load_lora_adapter", json=body), 400)
    assert "conflicts with a served base model" in error_of(load(client, BASE, target.adapter_path), 400)["message"]


def test_a54_load_from_nowhere(client: httpx.Client, tmp_path: Path) -> None:
    error_of(load(client, "Y", str(tmp_path / "missing")), 404)
    error_of(load(client, "Y", str(tmp_path)), 400)
    error_of(client.get("/v1/models/Y"), 404)


def test_a55_unload(client: httpx.Client, loaded: str) -> None:
    chat(client, loaded, max_tokens=1)
    response = unload(client, loaded)
    assert response.status_code == 200
    assert response.text == f"Success: LoRA adapter '{loaded}' removed successfully."
    error_of(ask(client, loaded), 404, code="model_not_found")
    assert "cannot be found" in error_of(unload(client, loaded), 404)["message"]
    error_of(unload(client, BASE), 404)
    error_of(unload(client, ""), 400)


def test_a56_interleaved_functions(client: httpx.Client) -> None:
    names = list(itertools.islice(itertools.cycle((BASE, A1, A2)), 20))
    with ThreadPoolExecutor(8) as pool:
        answers = set(zip(names, pool.map(lambda name: said(client, name), names), strict=True))
    assert answers == {(BASE, TEXT), (A1, TEXT.upper()), (A2, TEXT[::-1])}


# --- beyond the numbered checks ----------------------------------------------------------------------------------


def test_every_answer_says_what_it_met(client: httpx.Client) -> None:
    for fields in ({}, {"stream": True}):
        response = ask(client, A1, **fields)
        assert re.fullmatch(r"[a-z-]+;dur=\d+\.\d(, [a-z-]+;dur=\d+\.\d)*", response.headers["x-serverlesslora-cold"])
        assert re.fullmatch(r"\S+", response.headers["x-serverlesslora-adapter"])
        assert response.headers["x-request-id"]
        assert "x-serverlesslora-adapter" not in ask(client, BASE, **fields).headers


def test_openai_client(target: Target) -> None:
    with openai.OpenAI(base_url=f"{target.url}/v1", api_key="x", max_retries=0) as sdk:
        assert {BASE, *ADAPTER_NAMES} <= {model.id for model in sdk.models.list()}
        whole = sdk.chat.completions.create(
            model=A1, messages=[{"role": "user", "content": TEXT}], temperature=0, logprobs=True, top_logprobs=1
        )
        assert whole.choices[0].message.content == TEXT.upper()
        assert whole.choices[0].logprobs
        streamed = list(
            sdk.chat.completions.create(
                model=A1,
                messages=[{"role": "user", "content": TEXT}],
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(each.choices[0].delta.content or "" for each in streamed if each.choices) == TEXT.upper()
        assert streamed[0].choices[0].delta.role == "assistant"
        assert streamed[-1].usage == whole.usage
        text = sdk.completions.create(model=BASE, prompt=[TEXT, TEXT], max_tokens=4, stream=True, temperature=0)
        assert {choice.index for chunk in text for choice in chunk.choices} == {0, 1}
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(model=A1, messages=[{"role": "user", "content": "x"}], temperature=9)
        assert caught.value.param == "temperature"
