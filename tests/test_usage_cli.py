"""`serverlesslora usage` against a real admin port with a real ledger behind it."""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from serverlesslora.cli import usage
from serverlesslora.errors import ConfigError, ServerlessLoraError, Unavailable
from serverlesslora.gateway.usage_api import usage_routes
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.prices import read_prices
from serverlesslora.metering.usage import RequestUsage, Residency

MARKUP = "[red]=evil[/red]\x1b[31m"
NUM_REQUESTS = 7


def failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerlessLoraError)
    return Response(msgspec.json.encode({"error": error.to_wire()}), error.status)


class Announced(uvicorn.Server):
    """Says when it listens, and where."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = threading.Event()

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        self.is_listening.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "u.db")

    async def fill() -> None:
        await ledger.startup()
        now = time.time()
        for number in range(NUM_REQUESTS):
            ledger.note(
                RequestUsage(
                    request_id=f"r{number}",
                    function="upper" if number else MARKUP,
                    tenant="acme",
                    domain="demo/tenant:acme",
                    backbone="demo",
                    digest=None,
                    started_at=now - 3600 * number - 1,
                    prompt_tokens=10,
                    cached_tokens=0,
                    completion_tokens=5,
                    device_s=100.0,
                    queue_s=0.0,
                    ttft_s=0.5,
                    duration_s=1.0,
                    rung="hot",
                    status="finished",
                    slo_missed=False,
                )
            )
        ledger.resident([Residency("backbone:demo", "backbone", None, None, None, 10**9, 7200.0, now - 7200)])
        await ledger.shutdown()

    asyncio.run(fill())
    ledger.problem = "the disk is [b]full"
    app = Starlette(routes=usage_routes(ledger, read_prices()), exception_handlers={ServerlessLoraError: failed})
    running = Announced(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run)
    thread.start()
    assert running.is_listening.wait(30)
    yield running.url
    running.should_exit = True
    thread.join()


def run(url: str, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    usage.add_parsers(parser.add_subparsers(dest="command"))
    parsed = parser.parse_args(["usage", "--server", url, *arguments])
    code: int = parsed.run(parsed)
    return code


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("wide")
def test_a_table_of_sums(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server) == 0
    out = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert "upper" in lines and "idle" in lines and "all" in lines
    assert str(NUM_REQUESTS) in lines["all"]
    assert "ILLUSTRATION" in out and "USD" in out
    assert "[red]=evil[/red]" in out and "\x1b[31m" not in out  # names reach the terminal as text
    assert "the disk is [b]full" in out


@pytest.mark.usefixtures("wide")
def test_windows_and_groups(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--by", "tenant", "--since", "90m") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "acme" in line)
    assert line.split("│")[2].strip() == "2"
    assert run(server, "--by", "domain", "--until", "1990-01-01") == 0
    assert "acme" not in capsys.readouterr().out


@pytest.mark.usefixtures("wide")
def test_requests_newest_first(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--by", "request", "--limit", "2") == 0
    out = capsys.readouterr().out
    assert out.index("r0") < out.index("r1")
    assert "r2" not in out
    assert "more rows" in out


def test_json(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--json", "--by", "tenant") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["total"]["usage"]["requests"] == NUM_REQUESTS
    assert run(server, "--json", "--by", "request") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == NUM_REQUESTS


def test_csv_has_every_page(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "PAGE", 3)
    path = tmp_path / "usage.csv"
    assert run(server, "--by", "request", "--csv", str(path)) == 0
    assert f"{NUM_REQUESTS} rows" in capsys.readouterr().out
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["request_id"] for row in rows] == [f"r{number}" for number in range(NUM_REQUESTS)]
    assert rows[0]["function"] == MARKUP
    assert run(server, "--by", "request", "--csv", "-", "--limit", "5") == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 5
    assert run(server, "--csv", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 3}


def test_without_an_answer_no_file_is_touched(server: str, tmp_path: Path) -> None:
    path = tmp_path / "usage.csv"
    path.write_text("older")
    with pytest.raises(ServerlessLoraError, match="since='soon'"):
        run(server, "--csv", str(path), "--since", "soon")
    with pytest.raises(Unavailable):
        run("http://127.0.0.1:1", "--csv", str(path))
    assert path.read_text() == "older"
    with pytest.raises(ConfigError, match="cannot write"):
        run(server, "--csv", str(tmp_path))
