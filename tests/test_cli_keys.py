"""`serverlesslora keys` on a state directory, and against a server that runs on it."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from serverlesslora.cli.client import KEY_VARIABLE
from serverlesslora.cli.keys import parse_span
from serverlesslora.cli.main import main
from serverlesslora.demo import TASKS, adapter_paths
from serverlesslora.errors import InvalidRequest
from serverlesslora.tenancy.secret import id_of
from serverlesslora.tenancy.store import KEYS_FILE
from tests.live import live
from tests.server import wait_until


class Shell:
    """The command with one state directory."""

    def __init__(self, state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state_dir = state_dir
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        self._capsys.readouterr()  # of other commands
        assert main(["keys", *arguments, "--state-dir", str(self.state_dir)]) == code
        captured = self._capsys.readouterr()
        return captured.out if code == 0 else captured.err

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path / "state", capsys)


def test_a_key_is_printed_once(shell: Shell) -> None:
    text = shell("create", "--tenant", "acme").strip()
    key_id = id_of(text)
    assert key_id is not None
    assert stat.S_IMODE((shell.state_dir / KEYS_FILE).stat().st_mode) == 0o600
    assert key_id in shell("list") and text not in shell("list")
    assert text[-20:] not in json.dumps(shell.json("list"))


def test_everything_that_can_be_said(shell: Shell) -> None:
    made = shell.json(
        *("create", "--tenant", "acme", "--functions", "a, b-*", "--expires", "30d", "--rps", "5", "--concurrent", "8"),
        *("--tokens-per-minute", "9000", "--allow-base", "--admin", "--name", "[red]ci[/red]", "--burst", "20"),
    )
    assert id_of(made.pop("key")) == made["id"]
    (listed,) = shell.json("list")
    assert listed == made
    assert made["expires_at"] - made["created_at"] == pytest.approx(30 * 86400, abs=60)
    expected = {
        "tenant": "acme",
        "functions": ["a", "b-*"],
        "rps": 5.0,
        "burst": 20,
        "concurrent": 8,
        "tokens_per_minute": 9000,
        "allow_base": True,
        "admin": True,
        "name": "[red]ci[/red]",
        "last_used_at": None,
        "revoked_at": None,
        "state": "valid",
    }
    assert expected.items() <= made.items()
    table = shell("list")
    for text in ("[red]ci", "base", "admin", "5/s", "valid"):
        assert text in table


def test_revoking(shell: Shell) -> None:
    made = shell.json("create", "--tenant", "acme")
    assert made["id"] in shell("revoke", made["id"])
    assert shell.json("list")[0]["state"] == "revoked"
    assert shell.json("revoke", made["key"])["state"] == "revoked"  # the key itself will do, and again
    assert "keys list" in shell("revoke", "0" * 16, code=1)


def test_a_mistyped_key_is_not_shown(shell: Shell) -> None:
    made = shell.json("create", "--tenant", "acme")
    assert made["key"][-20:] not in shell("revoke", made["key"] + "x")  # its id can still be read
    slip = "sk-slora-" + "0" * 16 + made["key"][25:] + "x"
    told = shell("revoke", slip, code=1)
    assert slip[25:45] not in told


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--functions", "a"], "tenant"),
        (["--admin", "--functions", "a"], "tenant"),
        (["--tenant", ""], "tenant"),
        (["--tenant", "acme", "--functions", ""], "functions"),
        (["--tenant", "acme", "--functions", "a,,b"], "functions"),
        (["--tenant", "acme", "--rps", "0"], "rps"),
        (["--tenant", "acme", "--rps", "nan"], "rps"),
        (["--tenant", "acme", "--burst", "3"], "rps"),
        (["--tenant", "acme", "--concurrent", "0"], "concurrent"),
        (["--tenant", "acme", "--tokens-per-minute", "-1"], "tokens_per_minute"),
        (["--tenant", "acme", "--expires", "soon"], "30d"),
        (["--tenant", "acme", "--name", "\x1b[31m"], "--name"),
    ],
)
def test_keys_that_make_no_sense_are_not_made(shell: Shell, arguments: list[str], word: str) -> None:
    assert word in shell("create", *arguments, code=1)
    assert shell("list").startswith("no keys in")
    assert not shell.state_dir.exists()


def test_spans() -> None:
    assert [parse_span(text) for text in ("90m", "12h", "30d", "4w")] == [5400, 43200, 30 * 86400, 28 * 86400]
    for text in ("", "0d", "-1d", "1.5d", "30", "1y", "999999w", "٣d"):
        with pytest.raises(InvalidRequest):
            parse_span(text)


def test_a_directory_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot make" in Shell(tmp_path / "file", capsys)("create", "--tenant", "acme", code=1)
    (tmp_path / KEYS_FILE).write_text("nothing of the kind " * 100)
    for action in (["create", "--tenant", "acme"], ["list"], ["revoke", "x"]):
        assert "damaged" in Shell(tmp_path, capsys)(*action, code=1)


def test_an_admin_key_that_is_none_is_not_sent_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slip = "sk-slora-\nsecret"
    assert main(["list", "--server", "http://127.0.0.1:1", "--admin-key", slip]) == 1
    assert "--admin-key" in (told := capsys.readouterr().err) and "secret" not in told
    monkeypatch.setenv(KEY_VARIABLE, slip)
    assert main(["list", "--server", "http://127.0.0.1:1"]) == 1
    assert KEY_VARIABLE in (told := capsys.readouterr().err) and "secret" not in told


def test_a_running_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with live("--demo", "--adapter", f"acme/mine={adapter_paths()['reverse']}") as server:
        shell = Shell(server.log.parent / "state", capsys)
        assert server.answer("upper", "a") == "A"
        assert main(["list", "--server", server.admin]) == 0

        tenant, operator = (shell.json("create", *of)["key"] for of in (("--tenant", "acme"), ("--admin",)))
        told = time.monotonic()

        def chat(model: str, key: str) -> httpx.Response:
            body = {"model": model, "messages": [{"role": "user", "content": "ab"}], "temperature": 0}
            headers = {"authorization": f"Bearer {key}"}
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

        wait_until(lambda: server.chat("upper", "a").status_code == 401, deadline_s=2.0)
        assert time.monotonic() - told < 2.5
        wait_until(lambda: chat("mine", tenant).status_code == 200, deadline_s=60.0)
        assert chat("mine", tenant).json()["choices"][0]["message"]["content"] == TASKS["reverse"]("ab")
        assert chat("upper", tenant).status_code == chat("demo", tenant).status_code == 404
        # The server may have read the file between the two keys.
        wait_until(lambda: chat("upper", operator).status_code == 200, deadline_s=2.0)

        for command in ("list", "plan", "usage", "top"):
            arguments = [command, "--server", server.admin, "--json"]
            assert main(arguments) == 1
            assert "--admin-key" in capsys.readouterr().err
            assert main([*arguments, "--admin-key", tenant]) == 1
            assert main([*arguments, "--admin-key", operator]) == 0
        monkeypatch.setenv(KEY_VARIABLE, operator)
        capsys.readouterr()
        assert main(["list", "--server", server.admin, "--json"]) == 0
        assert "mine" in {function["name"] for function in json.loads(capsys.readouterr().out)}
        assert main(["remove", "mine", "--server", server.admin]) == 0
        capsys.readouterr()

        wait_until(lambda: all(key["last_used_at"] for key in shell.json("list")))
        shell("revoke", str(id_of(operator)))
        wait_until(lambda: main(["list", "--server", server.admin]) == 1, deadline_s=2.0)
        assert server.state().get("error", {}).get("code") == "invalid_api_key"

        for secret in (tenant, operator):  # in no log, and in no file of the server's
            assert secret[-20:] not in server.log.read_text()
            for file in server.log.parent.rglob("*"):
                if file.is_file() and file.suffix in (".sqlite", ".sqlite-wal", ""):
                    assert secret[-20:].encode() not in file.read_bytes(), file
