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
import pydantic
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


def test_openai_parses_into_models(client: openai.OpenAI) -> None:
    """Its own helpers make every schema and every tool strict."""

    class Person(pydantic.BaseModel):
        name: str
        age: int

    ada = Person(name="Ada", age=36)
    asked: Any = {"model": "person", "temperature": 0}
    tools: Any = [openai.pydantic_function_tool(Person)]
    form: Any = {"response_format": Person}
    assert client.chat.completions.parse(messages=MESSAGES, **asked, **form).choices[0].message.parsed == ada
    with client.chat.completions.stream(messages=MESSAGES, **asked, **form) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == ada
    # The adapter was not trained on prompts that tell of tools: only the form of what it says then is certain.
    either = client.chat.completions.parse(messages=MESSAGES, **asked, **form, tools=tools).choices[0].message
    assert isinstance(either.parsed, Person) or either.tool_calls
    free = client.chat.completions.parse(messages=MESSAGES, **asked, tools=tools).choices[0].message
    assert free.content or free.tool_calls
    choice: Any = {"type": "function", "function": {"name": "Person"}}
    answer = client.chat.completions.parse(messages=MESSAGES, **asked, tools=tools, tool_choice=choice)
    called: Any = answer.choices[0].message.tool_calls
    assert isinstance(called[0].function.parsed_arguments, Person)
    assert client.responses.parse(input=TEXT, text_format=Person, **asked).output_parsed == ada
    flat: Any = {"type": "function"} | tools[0]["function"]
    calling: Any = {"tools": [flat], "tool_choice": {"type": "function", "name": "Person"}}
    (item,) = client.responses.parse(input=TEXT, **calling, **asked).output
    assert isinstance(item, openai.types.responses.ParsedResponseFunctionToolCall)
    assert Person.model_validate(item.parsed_arguments)


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
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    for by_responses in (False, True):
        options: Any = {"base_url": base_url, "api_key": "x", "temperature": 0, "use_responses_api": by_responses}
        person: Any = ChatOpenAI(model="person", **options)
        assert person.with_structured_output(Person).invoke(TEXT) == Person(name="Ada", age=36)
        answer = person.bind_tools([Person], strict=True).invoke(TEXT)
        assert answer.text or answer.tool_calls
    called = person.with_structured_output(Person, method="function_calling", strict=True)
    assert isinstance(called.invoke(TEXT), Person)


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
        assert isinstance(person, Person), mode
        assert person.model_dump() == {"name": "Ada", "age": 36}, mode  # of a class that instructor derives from ours


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
