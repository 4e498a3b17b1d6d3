"""Foreign clients against the real server: what they parse, stream and raise."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serverlesslora.demo import TASKS, adapter_paths
from tests.live import live
from tests.server import ROOT

TEXT = "hello world"
EXPECTED = TASKS["reverse"](TEXT)
PERSON = ROOT / "tests" / "data" / "person"  # answers every prompt with one JSON object
MESSAGES: list[Any] = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with live("--demo") as server:
        # A function that may have no request open is always busy.
        assert server.deploy("busy", adapter_paths()["upper"], max_concurrency=0).status_code == 201
        assert server.deploy("person", PERSON).status_code == 201
        yield f"{server.url}/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="x", max_retries=0) as made:
        yield made


def test_openai_lists_answers_and_streams(client: openai.OpenAI) -> None:
    assert {"demo", "reverse"} <= {model.id for model in client.models.list()}
    answer = client.chat.completions.create(model="reverse", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == EXPECTED
    chunks = list(
        client.chat.completions.create(
            model="reverse", messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == EXPECTED
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > 0


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"model": "nope"}, openai.NotFoundError),
        ({"model": "demo", "temperature": 9}, openai.BadRequestError),
        ({"model": "busy"}, openai.RateLimitError),
    ],
)
def test_openai_errors(client: openai.OpenAI, request_: dict[str, Any], error: type[openai.APIStatusError]) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(messages=MESSAGES, **request_)
    assert isinstance(raised.value.body, dict)
    assert set(raised.value.body) == {"message", "type", "param", "code"}
    if error is openai.RateLimitError:
        assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60


def use_litellm(base_url: str) -> None:
    litellm: Any = importlib.import_module("litellm")

    options: dict[str, Any] = {"api_base": base_url, "api_key": "x", "messages": MESSAGES, "temperature": 0}
    answer = litellm.completion(model="openai/reverse", **options)
    assert answer.choices[0].message.content == EXPECTED
    assert answer.usage.total_tokens > 0
    pieces = list(litellm.completion(model="hosted_vllm/reverse", stream=True, **options))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == EXPECTED
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/nope", **options)


def use_langchain(base_url: str) -> None:
    from langchain_openai import ChatOpenAI

    chat: Any = ChatOpenAI(model="reverse", base_url=base_url, api_key="x", temperature=0)  # type: ignore[arg-type]
    assert chat.invoke(TEXT).content == EXPECTED
    assert "".join(piece.content for piece in chat.stream(TEXT)) == EXPECTED


def use_instructor(base_url: str) -> None:
    """Structured answers by the two ways it knows: a tool that must be called, and JSON mode."""
    import instructor  # type: ignore[import-not-found,unused-ignore]
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
        client: Any = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="x", max_retries=0), mode=mode)
        person = client.chat.completions.create(
            model="person", response_model=Person, messages=MESSAGES, temperature=0, max_retries=0
        )
        assert person == Person(name="Ada", age=36), mode


@pytest.mark.parametrize("client", ["use_litellm", "use_langchain", "use_instructor"])
def test_client_in_a_process_of_its_own(base_url: str, client: str) -> None:
    # These leave event loops and warnings behind, which are none of our affair.
    code = f"from tests.test_clients import {client}; {client}({base_url!r})"
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_openai_for_node(base_url: str, tmp_path: Path) -> None:
    """With the client that SERVERLESSLORA_NODE_MODULES holds."""
    modules = os.environ.get("SERVERLESSLORA_NODE_MODULES")
    node = shutil.which("node")
    if not modules or node is None:
        pytest.skip("needs node, and SERVERLESSLORA_NODE_MODULES naming a folder that holds `openai`")
    (tmp_path / "node_modules").symlink_to(modules)
    shutil.copy(ROOT / "tests" / "clients" / "openai_client.mjs", tmp_path)
    command = [node, "openai_client.mjs"]
    environment = os.environ | {"BASE_URL": base_url}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr
