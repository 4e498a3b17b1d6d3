"""The ledger of a server that is killed agrees with what its clients received; a server that lives adds up."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import httpx

from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.usage import RequestUsage
from tests.live import Live, live

FUNCTIONS = ("upper", "reverse", "demo")


async def stream(client: httpx.AsyncClient, server: Live, model: str, request_id: str) -> int | None:
    """Output tokens of an answer that arrived whole; None when it was cut off."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello world"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens, is_whole = None, False
    try:
        async with client.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, headers={"x-request-id": request_id}
        ) as answer:
            async for line in answer.aiter_lines():
                is_whole = is_whole or line == "data: [DONE]"
                if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                    tokens = usage["completion_tokens"]
    except httpx.HTTPError:
        return None
    return tokens if is_whole else None


async def rows(state_dir: Path) -> list[RequestUsage]:
    ledger = Ledger(state_dir / "usage.sqlite")
    await ledger.startup()
    try:
        return list((await ledger.requests(limit=100_000)).requests)
    finally:
        await ledger.shutdown()


def test_a_killed_server_has_written_down_every_answer_that_arrived_whole() -> None:
    async def until_killed(server: Live) -> dict[str, int]:
        whole: dict[str, int] = {}

        async def keep_asking(client: httpx.AsyncClient, number: int) -> None:
            for turn in range(1000):
                request_id = f"r-{number}-{turn}"
                tokens = await stream(client, server, FUNCTIONS[number % len(FUNCTIONS)], request_id)
                if tokens is None:
                    return
                whole[request_id] = tokens
                if len(whole) == 20:
                    server.process.send_signal(signal.SIGKILL)  # while the others are somewhere in their answers

        async with httpx.AsyncClient(timeout=30) as client:
            await asyncio.gather(*(keep_asking(client, number) for number in range(6)))
        return whole

    with live("--demo") as server:
        whole = asyncio.run(until_killed(server))
        server.process.wait(timeout=10)
        found = asyncio.run(rows(server.log.parent / "state"))
    by_request = {row.request_id.partition("/")[0]: row for row in found}
    assert len(by_request) == len(found)
    for request_id, tokens in whole.items():
        assert by_request[request_id].status == "finished"
        assert by_request[request_id].completion_tokens == tokens
    assert {row.status for row in found} <= {"finished", "interrupted"}
    assert "interrupted" in {row.status for row in found}


def test_device_seconds_of_requests_add_up_to_the_time_the_device_was_busy() -> None:
    async def some(server: Live) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            asked = [stream(client, server, FUNCTIONS[n % 3], f"r-{n}") for n in range(30)]
            leaving = asyncio.ensure_future(stream(client, server, "upper", "leaves"))
            gathered = asyncio.gather(*asked)
            await asyncio.sleep(0.3)
            leaving.cancel()
            assert all(tokens is not None for tokens in await gathered)

    with live("--demo") as server:
        asyncio.run(some(server))
        report = httpx.get(f"{server.admin}/admin/usage", timeout=10).json()
        busy_s = sum(worker["stats"]["busy_s"] for worker in server.state()["workers"])
        spent_s = report["total"]["usage"]["device_s"]
    assert abs(spent_s / busy_s - 1) <= 0.01, (spent_s, busy_s)
