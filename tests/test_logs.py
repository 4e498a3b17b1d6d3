"""Lines say who, about which request, and never what was asked, answered or presented as a key."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serverlesslora import logs
from serverlesslora.gateway.app import create_app
from serverlesslora.log_outlet import Outlet
from serverlesslora.logs import JsonLines, Repetition, TextLines, trace_of
from serverlesslora.tenancy.key import Grant
from serverlesslora.tenancy.store import KEYS_FILE, KeyStore
from tests.backend_fake import FakeBackend
from tests.live import Live, live
from tests.server import ROOT, is_healthy, running, wait_until

CANARY = "zqxjkv"  # the demo answers with it in capitals; it is in no code and no name


def record(
    level: int = logging.WARNING, message: str = "something", name: str = "serverlesslora.x", **more: Any
) -> logging.LogRecord:
    made = logging.LogRecord(name, level, "file", 1, message, (), None)
    made.__dict__.update(more)
    return made


class Asked:
    def log_fields(self) -> dict[str, Any]:
        return {"request_id": "r1", "function": "f"}


def test_a_line_of_json_has_what_is_known() -> None:
    with logs.about(Asked()):
        line = json.loads(JsonLines("gateway").format(record(message="two\nlines", fields={"status": 200})))
    assert line["message"] == "two\nlines"
    assert (line["level"], line["role"], line["pid"]) == ("warning", "gateway", os.getpid())
    assert (line["request_id"], line["function"], line["status"]) == ("r1", "f", 200)
    assert "request_id" not in json.loads(JsonLines("gateway").format(record()))


def test_a_line_of_text_is_one_line() -> None:
    with logs.about(Asked()):
        line = TextLines("gateway").format(record(message="two\nlines\x1b[31m", fields={"status": "2\n0"}))
    assert "\n" not in line and "\x1b" not in line
    assert line.endswith(r"serverlesslora.x: two\nlines\x1b[31m request_id=r1 function=f status=2\n0")
    assert f"warning gateway[{os.getpid()}]" in line


def caught(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as raised:
        return raised


def test_the_text_of_an_unexpected_error_is_withheld() -> None:
    error = caught(ValueError(CANARY), caught(KeyError(CANARY)))
    info = (type(error), error, error.__traceback__)
    for shown in (
        trace_of(error, with_text=False),
        JsonLines().format(record(exc_info=info, withhold=True)),
        TextLines().format(record(exc_info=info, name="uvicorn.error")),
    ):
        assert CANARY not in shown
        assert "ValueError (its text is not logged)" in shown and "KeyError" in shown and "test_logs.py" in shown
    assert CANARY in JsonLines().format(record(exc_info=info))
    assert "NameError: name 'x'" in trace_of(caught(NameError("name 'x' is not defined")), with_text=False)


def test_a_flood_of_one_warning_is_held_back_and_counted() -> None:
    now = 0.0
    repetition = Repetition(lambda: now)
    assert [repetition.filter(record()) for _ in range(1000)].count(True) == logs.REPEATS
    assert repetition.filter(record(message="another"))
    assert all(repetition.filter(record(logging.INFO)) for _ in range(100))
    now = logs.WINDOW_S
    late = record()
    assert repetition.filter(late)
    assert f"repeated={1000 - logs.REPEATS}" in TextLines().format(late)
    for number in range(5000):
        repetition.filter(record(message=str(number)))
    assert len(repetition._seen) <= logs.MAX_KINDS


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root, ours = logging.getLogger(), logging.getLogger("serverlesslora")
    before, level, our_level = root.handlers[:], root.level, ours.level
    environment = {name: os.environ.get(name) for name in (logs.FORMAT_VARIABLE, logs.LEVEL_VARIABLE)}
    yield root
    root.handlers[:] = before
    root.setLevel(level)
    ours.setLevel(our_level)
    logging.captureWarnings(False)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def test_only_our_own_loggers_speak_below_warnings(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "json", role="gateway")
    logging.getLogger("serverlesslora.x").debug("ours")
    logging.getLogger("httpx").info("theirs")
    logs.set_up_child()  # as a child would, which finds the settings in its environment
    logging.getLogger("serverlesslora.x").debug("ours too")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of a library", stacklevel=1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"].partition(": ")[0] for line in lines[:2]] == ["ours", "ours too"]
    assert "of a library" in lines[2]["message"]
    assert [line["role"] for line in lines] == ["gateway", "process", "process"]


class Broken(FakeBackend):
    def model(self, name: str) -> Any:
        raise ValueError(f"no idea what to do with {CANARY}")


def test_an_internal_error_of_a_request_shows_where_but_not_what(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("debug", "json", role="gateway")
    with running(create_app(Broken())) as url:
        body = {"model": CANARY, "messages": [{"role": "user", "content": CANARY}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "r7"}).status_code == 500
    error, access = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (error["message"], error["request_id"]) == ("unexpected error", "r7")
    assert "ValueError (its text is not logged)" in error["exception"]
    assert (access["request_id"], access["status"], access["outcome"]) == ("r7", 500, "failed")
    assert CANARY not in json.dumps([error, access])


def test_what_asyncio_and_threads_and_workers_say_quotes_nobody(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    try:
        logs.set_up("debug", "json", role="gateway")

        async def fail() -> None:
            raise ValueError(CANARY)

        async def leave_it() -> None:
            asyncio.get_running_loop().set_exception_handler(logs.report_unseen)
            task = asyncio.create_task(fail())
            await asyncio.wait([task])
            del task
            gc.collect()

        asyncio.run(leave_it())
        thread = threading.Thread(target=lambda: int(CANARY))
        thread.start()
        thread.join()
        logs.belongs_to("demo/tenant:acme")
        for error in (ValueError(CANARY), RuntimeError("CUDA error: misaligned address")):
            logging.getLogger("serverlesslora.worker").error("it failed", exc_info=caught(error))
    finally:
        sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    text = capsys.readouterr().err
    assert [json.loads(line)["message"] for line in text.splitlines()] == [
        "in the event loop: Task exception was never retrieved",
        "a thread has ended with an error",
        "it failed",
        "it failed",
    ]
    assert CANARY not in text and "misaligned address" in text


def test_what_nobody_reads_is_lost_and_counted() -> None:
    reading, writing = os.pipe()
    try:
        outlet = Outlet(writing)
        taken = 0
        while outlet.write(b"x" * 999 + b"\n"):
            taken += 1
        assert not outlet.write(b"y\n" * 3000) and outlet.lost == 2 and taken > 10
        os.set_blocking(reading, False)
        assert len(os.read(reading, 1 << 20)) >= taken * 1000
        assert outlet.write(b"again\n")
        assert os.read(reading, 1 << 20).endswith(b"again\n")
        assert os.get_blocking(writing)  # others share it
        while outlet.write(b"z" * 100_000 + b"\n"):  # cut in the middle: the next line does not continue it
            pass
        while b"z" in os.read(reading, 1 << 20):
            if outlet.write(b"next\n"):
                assert os.read(reading, 1 << 20).split(b"\n")[-2:] == [b"next", b""]
                break
        os.close(reading)
        reading = -1
        assert not outlet.write(b"to nobody\n")
    finally:
        os.close(writing)
        if reading >= 0:
            os.close(reading)


@pytest.mark.parametrize("kind", ["file", "socket", "null"])
def test_other_things_than_pipes(kind: str, tmp_path: Path) -> None:
    if kind == "socket":
        ours, theirs = socket.socketpair()
        with ours, theirs:
            outlet = Outlet(ours.fileno())
            while outlet.write(b"x" * 999 + b"\n"):
                pass
            assert outlet.lost == 1 and ours.getblocking()
        return
    path = tmp_path / "log" if kind == "file" else Path("/dev/null")
    with path.open("ab") as file:
        file.write(b"before\n")
        file.flush()
        assert Outlet(file.fileno()).write(b"a line\n")
    assert path.read_bytes() == (b"before\na line\n" if kind == "file" else b"")


# --- a real server


def test_a_server_whose_log_nobody_reads_answers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    code = f"""
import os
from serverlesslora import logs
from serverlesslora.gateway.app import create_app
from tests.backend_fake import FakeBackend
import uvicorn
logs.set_up("info", "json", role="gateway")
uvicorn.run(create_app(FakeBackend()), port={url.rpartition(":")[2]}, log_config=None, access_log=False)
"""
    roots = os.pathsep.join(str(ROOT / each) for each in (".", "ipc"))
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stderr=writing, env=os.environ | {"PYTHONPATH": roots})
    os.close(writing)
    try:
        wait_until(lambda: is_healthy(url), 30)
        with httpx.Client(base_url=url, timeout=10) as http:
            assert {http.get("/v1/models").status_code for _ in range(200)} == {200}
            os.read(reading, 1 << 20)
            http.get("/v1/models")
        assert b"lines of this process are lost" in os.read(reading, 1 << 20)
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def files_with(folder: Path, text: str) -> set[str]:
    wanted = text.lower().encode()
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and wanted in path.read_bytes().lower()
    }


def lines_of(server: Live) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


def test_nothing_that_was_said_is_written_down_anywhere() -> None:
    with live("--demo", "--log-level", "debug", "--log-format", "json") as server:
        folder = server.log.parent
        store = KeyStore(folder / "state" / KEYS_FILE)
        right = store.create(Grant(admin=True))
        wrong = "sk-slora-0123456789abcdef-" + "w" * 43
        bearer = {"authorization": f"Bearer {right.text}"}
        with httpx.Client(base_url=server.url, timeout=60) as http:
            chat, complete = "/v1/chat/completions", "/v1/completions"
            wait_until(lambda: http.get("/v1/models").status_code == 401)
            good = {"model": "upper", "messages": [{"role": "user", "content": CANARY}], "temperature": 0}
            answer = http.post(chat, json=good, headers=bearer | {"x-request-id": "good-1"}).json()
            assert answer["choices"][0]["message"]["content"] == CANARY.upper()
            for more in (
                {"stop": [CANARY]},
                {"temperature": CANARY},
                {"max_tokens": 10**9},
                {"messages": CANARY},
                {"messages": [{"role": CANARY, "content": CANARY}]},
                {"messages": [{"role": "user", "content": [{"type": CANARY}]}]},
                {"response_format": {"type": CANARY}},
                {"tools": [{"type": "function", "function": {"name": CANARY, "parameters": {CANARY: CANARY}}}]},
                {"logit_bias": {CANARY: 1}},
                {CANARY: CANARY},
                {"model": CANARY},
                {"model": right.text},
            ):
                http.post(chat, json=good | more, headers=bearer)
            for content in (
                CANARY.encode(),
                b'{"model": "upper", "prompt": "%s' % CANARY.encode(),
                b'{"model": "upper", "prompt": "%s\xff"}' % CANARY.encode(),
                b'{"model": "upper", "prompt": "%s\\ud800"}' % CANARY.encode(),
                b'{"a":' * 5000 + CANARY.encode(),
                b"[" + json.dumps(CANARY).encode() + b"]",
            ):
                headers = bearer | {"content-type": "application/json"}
                assert http.post(complete, content=content, headers=headers).status_code == 400
            http.post(complete, content=CANARY, headers=bearer | {"content-type": f"text/{CANARY}"})
            for key in (wrong, CANARY, right.text + "x"):
                assert http.post(chat, json=good, headers={"authorization": f"Bearer {key}"}).status_code == 401
                http.get(f"/v1/models/{key}", params={"api_key": key})
                http.post(f"{chat}?key={key}", json=good, headers={"x-api-key": key, "cookie": key})
            http.get(
                f"/v1/models/{right.text}",
                headers=bearer | {"x-request-id": f"mine-{right.text}", "x-slo-ttft-ms": CANARY},
            )
            http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/none"}, headers=bearer)
            with contextlib.closing(dial(server)) as raw:
                raw.sendall(
                    b"POST /%s HTTP/9.9\r\nauthorization: Bearer %s\r\n\x00\r\n\r\n"
                    % (CANARY.encode(), right.text.encode())
                )
                raw.recv(1000)
            head = (
                f"POST {chat} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {right.text}\r\ncontent-length: 99\r\n\r\n"
            )
            with contextlib.closing(dial(server)) as raw:  # leaves in the middle of its body
                raw.sendall((head + CANARY).encode())
            long = {"model": "upper", "prompt": CANARY, "max_tokens": 1500, "ignore_eos": True, "stream": True}
            headers = bearer | {"x-request-id": "cut-1"}
            with http.stream("POST", complete, json=long, headers=headers) as stream:
                pieces = stream.iter_lines()
                next(pieces)
                worker = server_worker(server, bearer)
                os.kill(worker, signal.SIGKILL)
                assert "worker_lost" in "".join(pieces)
            with http.stream("POST", complete, json=long, headers=bearer | {"x-request-id": "left-1"}) as stream:
                next(stream.iter_lines())
        wait_until(lambda: any(line.get("request_id") == "left-1" for line in lines_of(server)))
        server.process.terminate()
        assert server.process.wait(20) == 0

        assert files_with(folder, CANARY) == set()
        assert files_with(folder, wrong) == set()
        assert files_with(folder, right.text.rpartition("-")[2]) == set()
        # It would have been found: other things about the same requests are.
        assert "log" in files_with(folder, "good-1")
        assert any(name.startswith("state/usage") or "sqlite" in name for name in files_with(folder, "good-1"))

        access = {line["request_id"]: line for line in lines_of(server) if line["logger"] == "serverlesslora.access"}
        line = access["good-1"]
        assert (line["function"], line["key_id"], line["domain"]) == ("upper", right.key.id, "demo/function:upper")
        assert (line["status"], line["outcome"], line["route"]) == (200, "finished", "/v1/chat/completions")
        assert line["output_tokens"] > 0 and line["seconds"] >= line["ttft_s"] > 0
        assert line["rung"] in ("hot", "adapter-disk", "worker")
        assert access["cut-1"]["outcome"] == "failed"
        assert access["left-1"]["outcome"] == "aborted"
        assert not any(line.get("route") == "/ready" and line["level"] == "info" for line in access.values())


def dial(server: Live) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 80), timeout=10)


def server_worker(server: Live, bearer: dict[str, str]) -> int:
    state = httpx.get(f"{server.admin}/admin/state", headers=bearer, timeout=10).json()
    (pid,) = [worker["pid"] for worker in state["workers"] if worker["domain"] == "demo/function:upper"]
    found: int = pid
    return found
