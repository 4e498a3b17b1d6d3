"""A real server whose adapters are far away: fetched when asked for, given up for room, fetched again, told about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serverlesslora.adapters.files import WEIGHTS
from serverlesslora.demo import TASKS, adapter_paths, backbone_path
from tests.adapter_host import AdapterHost, adapter_host
from tests.live import Live, live
from tests.server import wait_until

TEXT = "hello world"


@pytest.fixture(scope="module")
def host() -> Iterator[AdapterHost]:
    with adapter_host() as host:
        for name, path in adapter_paths().items():
            host.put(f"/{name}", Path(path))
        yield host


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(host: AdapterHost, state: Path) -> Iterator[Live]:
    """A store that holds `mask` or `reverse`, not both."""
    options = ("--adapter-host", host.url, "--adapter-store-mb", "1", "--idle-timeout", "1", "--preload", "lru")
    with live(f"demo={backbone_path()}", "--dtype", "float32", *options, state_dir=state) as server:
        yield server


def deploy(server: Live, host: AdapterHost, name: str) -> str:
    wait_until(lambda: not server.workers(), 20)
    response = server.deploy(name, f"{host.url}/{name}", replace=True)  # type: ignore[arg-type]
    assert response.status_code == 201, response.text
    digest: str = response.json()["digest"]
    return digest


def is_stored(state: Path, digest: str) -> bool:
    return (state / "adapters" / digest).is_dir()


def test_what_left_the_store_is_fetched_when_it_is_asked_for(server: Live, host: AdapterHost, state: Path) -> None:
    reverse = deploy(server, host, "reverse")
    mask = deploy(server, host, "mask")
    assert (is_stored(state, reverse), is_stored(state, mask)) == (False, True)
    before = host.count(f"/reverse/{WEIGHTS}")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.chat("reverse", TEXT), range(8)))
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {TASKS["reverse"](TEXT)}
    # Not all of them: who comes when it is here has nothing to wait for.
    assert any("remote;dur=" in answer.headers["x-serverlesslora-cold"] for answer in answers)
    assert {answer.headers["x-serverlesslora-adapter"] for answer in answers} == {reverse}
    assert host.count(f"/reverse/{WEIGHTS}") == before + 1
    assert (is_stored(state, reverse), is_stored(state, mask)) == (True, False)
    assert "remote" not in server.chat("reverse", TEXT).headers.get("x-serverlesslora-cold", "")


def test_no_room_is_told_and_disturbs_nobody(server: Live, host: AdapterHost) -> None:
    deploy(server, host, "mask")
    deploy(server, host, "reverse")
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.chat, "reverse", TEXT, max_tokens=120, ignore_eos=True)
        wait_until(lambda: any(worker["open_requests"] for worker in server.workers().values()), 20)
        refused = server.chat("mask", TEXT)
        assert long.result().status_code == 200
    if refused.status_code != 200:  # the other one may have been done already
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
    wait_until(lambda: not server.workers(), 20)
    assert server.answer("mask", TEXT) == TASKS["mask"](TEXT)


def test_a_stream_lives_through_a_slow_transfer(server: Live, host: AdapterHost) -> None:
    deploy(server, host, "mask")
    deploy(server, host, "reverse")
    wait_until(lambda: not server.workers(), 20)
    path = f"/mask/{WEIGHTS}"
    sent = host.sent_bytes[path]
    host.stalled.add(path)
    body = {"model": "mask", "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "stream": True}
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
            wait_until(lambda: host.sent_bytes[path] > sent, 20)
            host.stalled.discard(path)
            host.go_on.set()
            lines = list(response.iter_lines())
    finally:
        host.stalled.discard(path)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == TASKS["mask"](TEXT)


def test_a_source_that_changed_is_said_so(server: Live, host: AdapterHost, state: Path) -> None:
    mask = deploy(server, host, "mask")
    deploy(server, host, "reverse")
    assert not is_stored(state, mask)
    path = f"/mask/{WEIGHTS}"
    whole = host.files[path]
    host.files[path] = whole[:-4] + bytes(4)
    try:
        answer = server.chat("mask", TEXT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_changed")
        assert mask in answer.text
    finally:
        host.files[path] = whole
    wait_until(lambda: not server.workers(), 20)
    assert server.answer("mask", TEXT) == TASKS["mask"](TEXT)


def test_what_cannot_be_fetched_again_stays_until_the_registry_has_it(server: Live, state: Path) -> None:
    """Two directories, and room for one: neither is given up for the other while they are fetched together."""
    wait_until(lambda: not server.workers(), 20)
    kept = [{"name": f"kept-{name}", "adapter": str(adapter_paths()[name])} for name in ("reverse", "mask")]
    last = httpx.post(f"{server.admin}/admin/apply", json={"functions": kept}, timeout=60).text.splitlines()[-1]
    assert json.loads(last)["error"]["status"] in (503, 507), last
    assert server.chat("kept-reverse", TEXT).status_code == server.chat("kept-mask", TEXT).status_code == 404


def test_a_deployment_tells_how_far_it_is(server: Live, host: AdapterHost) -> None:
    path = f"/swapcase/{WEIGHTS}"
    host.stalled.add(path)
    host.go_on.clear()
    body = {"function": {"name": "told", "adapter": f"{host.url}/swapcase"}}
    events = []
    try:
        headers = {"accept": "application/x-ndjson"}
        with httpx.stream("POST", f"{server.admin}/admin/functions", json=body, headers=headers, timeout=60) as lines:
            for line in lines.iter_lines():
                events.append(json.loads(line))
                if events[-1].get("done_bytes"):
                    host.go_on.set()
    finally:
        host.stalled.discard(path)
        host.go_on.set()
    assert events[0] == {"function": "told", "step": "fetching"}
    assert any(event.get("done_bytes", 0) >= len(host.files[path]) // 2 for event in events)
    assert events[-1]["deployed"]["name"] == "told"


def test_where_the_server_may_not_go(server: Live, host: AdapterHost) -> None:
    for source in ("https://169.254.169.254/latest", "http://127.0.0.1:1/a", f"{host.url}/a?x=1#y"):
        response = server.deploy("bad", source)  # type: ignore[arg-type]
        assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_invalid"), source
    card = httpx.get(f"{server.url}/v1/models/mask").json()
    assert card["root"] == f"{host.url}/mask"


def test_who_waits_for_a_transfer_hears_when_the_drain_time_is_over(server: Live, host: AdapterHost) -> None:
    """The last one of this server: it is stopped."""
    wait_until(lambda: not server.workers(), 20)
    deploy(server, host, "mask")
    deploy(server, host, "reverse")
    path = f"/mask/{WEIGHTS}"
    sent = host.sent_bytes[path]
    host.stalled.add(path)
    host.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.chat, "mask", TEXT)
        wait_until(lambda: host.sent_bytes[path] > sent, 20)
        server.process.terminate()
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 20)
        server.process.terminate()  # the drain time is over
        answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert server.process.wait(15) == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
