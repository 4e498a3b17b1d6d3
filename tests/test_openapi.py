"""Our OpenAPI document says what the application does, and the application does what the document says.

The text part of OpenAI's own document is held against it too, where there is a copy of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.openapi import OPERATIONS, document
from tests.backend_fake import FakeBackend
from tests.schema_fuzz import Tally, fuzz
from tests.server import ROOT, running

MODELS = ("upper", "demo", "reverse")
SUBSET = Path(os.environ.get("SERVERLESSLORA_CONFORMANCE") or ROOT.parent / "shared" / "conformance")
QUICK = ("examples", "fuzzing")  # the coverage of every constraint takes half a minute: see bench/conformance.py


@pytest.fixture(scope="module")
def app() -> Starlette:
    return create_app(FakeBackend())


@pytest.fixture(scope="module")
def url(app: Starlette) -> Iterator[str]:
    with running(app) as url:
        yield url


@pytest.fixture(scope="module")
def spec(url: str) -> dict[str, Any]:
    spec: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
    return spec


def test_every_route_is_in_it_and_nothing_else(app: Starlette, spec: dict[str, Any]) -> None:
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.include_in_schema
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == {(path, method) for path, methods in spec["paths"].items() for method in methods}


def test_operations_have_what_readers_need(spec: dict[str, Any]) -> None:
    assert spec["openapi"].startswith("3.1")
    operations = [op for methods in spec["paths"].values() for op in methods.values()]
    assert len({op["operationId"] for op in operations}) == len(operations) == len(OPERATIONS)
    for operation in operations:
        assert operation["summary"]
        assert all(each["description"] for each in operation["responses"].values())
    assert spec["paths"]["/health"]["get"]["security"] == []
    assert spec["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate_stream"):
        assert "text/event-stream" in spec["paths"][path]["post"]["responses"]["200"]["content"]


def test_references_lead_somewhere_and_schemas_are_schemas(spec: dict[str, Any]) -> None:
    schemas = spec["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for part in json.dumps(spec).split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in schemas


@pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS if each.body is not None], ids=lambda each: each.path
)
def test_examples_are_valid_and_work(url: str, spec: dict[str, Any], operation: Any) -> None:
    content = spec["paths"][operation.path][operation.method]["requestBody"]["content"]["application/json"]
    resolving = content["schema"] | {"components": spec["components"]}
    jsonschema.Draft202012Validator(resolving).validate(content["example"])
    response = httpx.post(url + operation.path, json=content["example"], timeout=30)
    if "lora_adapter" in operation.path:  # there is nothing at that path on this machine
        assert response.status_code == 404
        return
    assert response.status_code == 200, response.text
    media_type = response.headers["content-type"].partition(";")[0]
    answer = spec["paths"][operation.path]["post"]["responses"]["200"]["content"][media_type]
    if media_type == "application/json":
        jsonschema.Draft202012Validator(answer["schema"] | {"components": spec["components"]}).validate(response.json())


def test_the_document_is_the_same_every_time() -> None:
    assert document() == document()


def check(tally: Tally, at_least: int) -> None:
    assert tally.passed, tally.output
    assert tally.failures == ()
    assert tally.cases >= at_least, tally.output


def test_our_document_holds(url: str, spec: dict[str, Any]) -> None:
    check(fuzz(spec, url, MODELS, max_examples=2, phases=QUICK), 30)


def test_openais_document_holds(url: str) -> None:
    path = SUBSET / "openai_text_subset.json"
    if not path.exists():
        pytest.skip("no copy of OpenAI's document: SERVERLESSLORA_CONFORMANCE names the folder of one")
    check(fuzz(json.loads(path.read_text()), f"{url}/v1", MODELS, max_examples=4, phases=QUICK), 10)


def test_a_server_that_breaks_its_word_is_found(spec: dict[str, Any]) -> None:
    wrong = {"openapi": "3.1.0", "info": spec["info"], "components": spec["components"], "paths": {}}
    version = json.loads(json.dumps(spec["paths"]["/version"]))
    version["get"]["responses"]["200"]["content"]["application/json"]["schema"] = {"type": "integer"}
    wrong["paths"]["/version"] = version
    with running(create_app(FakeBackend())) as url:
        tally = fuzz(wrong, url, MODELS, max_examples=1, phases=("fuzzing",))
    assert not tally.passed
    assert any("schema" in each for each in tally.failures), tally.output
