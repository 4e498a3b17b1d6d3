"""GET /admin/usage: windows, groupings, pages, CSV, and questions it refuses."""

from __future__ import annotations

import asyncio
import csv
import io
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from serverlesslora.cli.client import Refusal
from serverlesslora.errors import ServerlessLoraError
from serverlesslora.gateway.usage_api import parse_time, usage_routes
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.prices import TokenPrices, read_prices
from serverlesslora.metering.usage import RequestUsage, Residency

NOW = 1_800_000_000.0
DAY = 86400.0
PRICES = msgspec.structs.replace(read_prices(), tokens=TokenPrices(1.0, 2.0))
REQUESTS = [  # id, function, tenant, age
    ("r0", "upper", "acme", 30 * DAY),
    ("r1", "upper", "acme", 2 * DAY),
    ("r2", "=HYPERLINK(1)", "acme", 1800.0),
    ("r 3,/ü", "solo", None, 60.0),
]


def usage(request_id: str, function: str, tenant: str | None, age: float) -> RequestUsage:
    return RequestUsage(
        request_id=request_id,
        function=function,
        tenant=tenant,
        domain=f"demo/tenant:{tenant}" if tenant else f"demo/function:{function}",
        backbone="demo",
        digest=None,
        started_at=NOW - age,
        prompt_tokens=1000,
        cached_tokens=0,
        completion_tokens=500,
        device_s=2.0,
        queue_s=0.0,
        ttft_s=0.5,
        duration_s=1.0,
        rung="hot",
        status="finished",
        slo_missed=False,
        device="cpu",
    )


def failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerlessLoraError)
    return Response(msgspec.json.encode({"error": error.to_wire()}), error.status)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ledger") / "u.db"

    async def fill() -> None:
        ledger = Ledger(path)
        await ledger.startup()
        for entry in REQUESTS:
            ledger.note(usage(*entry))
        ledger.resident([Residency("backbone:demo", "backbone", None, None, None, 10**9, 100.0, NOW - 200)])
        await ledger.shutdown()

    asyncio.run(fill())
    return path


class Client:
    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path)
        routes = usage_routes(self.ledger, PRICES, clock=lambda: NOW)
        self._app = Starlette(routes=routes, exception_handlers={ServerlessLoraError: failed})

    def get(self, **query: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
                return await client.get("/admin/usage", params=query)

        return asyncio.run(ask())

    def json(self, **query: str) -> Any:
        response = self.get(**query)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def client(path: Path) -> Client:
    return Client(path)


def counts(answer: Any) -> dict[str | None, int]:
    return {"idle" if row["usage"]["idle"] else row["usage"]["key"]: row["usage"]["requests"] for row in answer["rows"]}


def test_sums_by_function_tenant_and_domain(client: Client) -> None:
    assert counts(client.json()) == {"upper": 2, "=HYPERLINK(1)": 1, "solo": 1, "idle": 0}
    assert counts(client.json(by="tenant")) == {"acme": 3, None: 1, "idle": 0}
    assert counts(client.json(by="domain")) == {"demo/tenant:acme": 3, "demo/function:solo": 1, "idle": 0}
    answer = client.json(by="tenant")
    assert answer["prices"]["currency"] == "USD" and answer["prices"]["illustrative"] is True
    assert answer["total"]["usage"]["requests"] == 4
    assert answer["total"]["money"]["charged"] == pytest.approx(4 * 2.0)
    assert answer["total"]["money"]["device"] == pytest.approx(8 * PRICES.device_price("cpu"))
    assert answer["total"]["money"]["holding"] == pytest.approx(100 * PRICES.gb_second.host)
    assert answer["problem"] is None


def test_a_limit_cuts_rows_and_not_the_total(client: Client) -> None:
    answer = client.json(limit="1")
    assert len(answer["rows"]) == 1 and answer["has_more"]
    assert answer["total"]["usage"]["requests"] == 4
    assert not client.json(limit="4")["has_more"]


@pytest.mark.parametrize(
    ("window", "found"),
    [
        ({"since": "1h"}, {"r2", "r 3,/ü"}),
        ({"since": "7d"}, {"r1", "r2", "r 3,/ü"}),
        ({"until": "7d"}, {"r0"}),
        ({"since": "1w", "until": "1h"}, {"r1"}),
        ({"since": f"{NOW - 1800}"}, {"r2", "r 3,/ü"}),  # the start belongs to it
        ({"until": f"{NOW - 1800}"}, {"r0", "r1"}),  # the end does not
        ({"since": "2027-01-15T07:58:00Z"}, {"r 3,/ü"}),
        ({"since": "2027-01-15T08:58:00+01:00"}, {"r 3,/ü"}),
        ({"since": "2027-01-15T07:58:00"}, {"r 3,/ü"}),
        ({"since": "2027-01-01", "until": "2027-01-14"}, {"r1"}),
        ({"since": "2s"}, set()),
    ],
)
def test_windows(client: Client, window: dict[str, str], found: set[str]) -> None:
    answer = client.json(by="request", **window)
    assert {row["usage"]["request_id"] for row in answer["rows"]} == found
    assert client.json(**window)["total"]["usage"]["requests"] == len(found)


def test_requests_come_in_pages(client: Client) -> None:
    seen: list[str] = []
    query = {"by": "request", "limit": "1"}
    while True:
        answer = client.json(**query)
        seen += [row["usage"]["request_id"] for row in answer["rows"]]
        if answer["next"] is None:
            break
        query["after"] = answer["next"]
    assert seen == ["r 3,/ü", "r2", "r1", "r0"]  # the newest first
    money = client.json(by="request")["rows"][0]["money"]
    assert money == {"device": 2 * PRICES.device_price("cpu"), "holding": 0, "charged": 2, "paid": money["device"]}


def test_csv(client: Client) -> None:
    response = client.get(format="csv")
    assert response.headers["content-type"].startswith("text/csv")
    assert "usage-by-function.csv" in response.headers["content-disposition"]
    rows = {row["function"]: row for row in csv.DictReader(io.StringIO(response.text))}
    assert rows.keys() == {"", "upper", "'=HYPERLINK(1)", "solo"}
    assert rows["upper"]["requests"] == "2" and rows[""]["idle"] == "True"
    seen: list[str] = []
    query = {"by": "request", "format": "csv", "limit": "3"}
    for _ in range(2):
        response = client.get(**query)
        seen += [row["request_id"] for row in csv.DictReader(io.StringIO(response.text))]
        query["after"] = response.headers.get("x-next-page", "")
    assert seen == ["r 3,/ü", "r2", "r1", "r0"]
    assert query["after"] == ""


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"by": "colour"}, "by"),
        ({"format": "xml"}, "format"),
        ({"since": "yesterday"}, "since"),
        ({"since": ""}, "since"),
        ({"since": "nan"}, "since"),
        ({"until": "1y"}, "until"),
        ({"until": "2026-13-01"}, "until"),
        ({"since": "1h", "until": "2h"}, "since"),
        ({"limit": "0"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"limit": "10001"}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"by": "request", "after": "what"}, "after"),
        ({"by": "tenant", "after": "1.0,r"}, "after"),
        ({"sinse": "1h"}, "sinse"),
    ],
)
def test_wrong_questions_are_refused_by_name(client: Client, query: dict[str, str], param: str) -> None:
    response = client.get(**query)
    assert response.status_code == 400
    error = msgspec.json.decode(response.content, type=Refusal).error
    assert (error.type, error.param) == ("invalid_request_error", param)
    assert param in error.message


def test_a_file_that_broke_later_is_a_fault_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "u.db").write_bytes(b"no database at all" * 100)
    response = Client(tmp_path / "u.db").get()
    assert response.status_code == 503
    assert "u.db" in response.json()["error"]["message"]


def test_a_problem_of_the_ledger_is_told(path: Path) -> None:
    client = Client(path)
    client.ledger.problem = "no room"
    assert client.json()["problem"] == client.json(by="request")["problem"] == "no room"


def test_times() -> None:
    assert parse_time("90s", NOW, "since") == NOW - 90
    assert parse_time("1.5h", NOW, "since") == NOW - 5400
    assert parse_time("12.5", NOW, "since") == 12.5
