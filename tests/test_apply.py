"""`apply`, `canary`, `rollback` and `versions`: what they decide, against a real server, and after it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from serverlesslora.cli.apply import read_functions
from serverlesslora.cli.main import main
from serverlesslora.cli.progress import follow
from serverlesslora.demo import ADAPTER_NAMES, adapter_paths
from serverlesslora.errors import ConfigError, InvalidRequest, ServerlessLoraError, Unavailable
from serverlesslora.gateway.telling import ChangeEvent
from serverlesslora.registry.declared import Declared, Difference, Fetched, decide, describe, differences
from serverlesslora.registry.entries import Entry, Facts, rolled_back
from serverlesslora.registry.file import Contents
from tests.live import Live, live

# --- deciding


def applied(contents: Contents, *declared: tuple[Declared, str], prune: bool = False) -> Contents:
    fetched = [Fetched(each, "base", digest, Facts(), None) for each, digest in declared]
    entries = dict(contents.entries)
    for change in decide(contents, fetched, now=0, prune=prune):
        if change.after is None:
            del entries[change.name]
        else:
            entries[change.name] = change.after
    return Contents(entries, contents.removed, contents.revision + 1)


EMPTY = Contents({}, {}, 0)


def f(**more: object) -> Declared:
    return Declared(name="f", adapter="/a", **more)  # type: ignore[arg-type]


def two_versions() -> Contents:
    return applied(applied(EMPTY, (f(), "one")), (f(), "two"))


def actions(before: Entry | None, after: Entry | None) -> tuple[str, ...]:
    return describe(before, after).actions


def test_new_content_is_a_new_version_for_all() -> None:
    first, second = applied(EMPTY, (f(), "one")), two_versions()
    assert second.entries["f"].weights == {2: 100}
    assert actions(None, first.entries["f"]) == ("create",)
    assert actions(first.entries["f"], second.entries["f"]) == ("new version", "route")


def test_what_is_there_already_changes_nothing() -> None:
    contents = two_versions()
    assert decide(contents, [Fetched(f(), "base", "two", Facts(), None)], now=9) == []


def test_settings_change_without_a_version() -> None:
    before = two_versions()
    after = applied(before, (f(tenant="t", pinned=True), "two"))
    row = describe(before.entries["f"], after.entries["f"])
    assert row.actions == ("update",)
    assert row.details == ("tenant: none -> t", "pinned: false -> true")


def test_a_canary_of_the_new_version_leaves_the_rest_where_it_is() -> None:
    contents = applied(two_versions(), (f(canary={"latest": 10}), "three"))
    assert contents.entries["f"].weights == {2: 90, 3: 10}
    assert applied(contents, (f(canary={"latest": 10}), "three")).entries == contents.entries
    assert applied(contents, (f(canary={"v3": 50}), "one")).entries["f"].weights == {1: 50, 3: 50}
    assert applied(contents, (f(weights={"v1": 1, "latest": 99}), "three")).entries["f"].weights == {1: 1, 3: 99}


def test_a_file_that_says_nothing_of_routing_keeps_a_canary_and_ends_what_it_does_not_name() -> None:
    contents = applied(two_versions(), (f(canary={"latest": 10}), "three"))
    assert applied(contents, (f(), "two")).entries["f"].weights == {2: 90, 3: 10}
    assert applied(contents, (f(), "one")).entries["f"].weights == {1: 100}


def test_another_backbone_is_another_version() -> None:
    changes = decide(two_versions(), [Fetched(f(), "other", "two", Facts(), None)], now=0)
    assert changes[0].after is not None
    assert changes[0].after.latest.backbone == "other"
    assert changes[0].after.last_number == 3


@pytest.mark.parametrize("weights", [{"v9": 100}, {"newest": 100}, {"latest": 50, "v2": 50}, {"v1": 99}])
def test_weights_that_cannot_be(weights: dict[str, int]) -> None:
    with pytest.raises(ServerlessLoraError):
        applied(two_versions(), (f(weights=weights), "two"))


def test_prune_removes_only_what_nobody_declares() -> None:
    other = Declared(name="g", adapter="/a")
    contents = applied(two_versions(), (other, "g"), (Declared(name="mine", adapter="/a"), "m"))
    fetched = [Fetched(other, "base", "g", Facts(), None)]
    changes = decide(contents, fetched, now=0, prune=True, keep=["mine"])
    assert [(change.name, change.action, change.after) for change in changes] == [("f", "prune", None)]
    assert [row.actions for row in differences(contents, fetched, changes)] == [("unchanged",), ("prune",)]
    assert decide(contents, fetched, now=0) == []


def test_numbers_are_not_used_again_after_a_removal() -> None:
    contents = applied(Contents({}, {"f": 7}, 0), (f(), "one"))
    assert contents.entries["f"].latest.number == 8


def test_a_rollback_ends_with_the_next_declaration_of_the_new_content() -> None:
    contents = two_versions()
    back = Contents({"f": rolled_back(contents.entries["f"], 1)}, {}, 3)
    assert applied(back, (f(), "two")).entries["f"].weights == {2: 100}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[[functions]]\nname = 'f'", "adapter"),
        ("[[functions]]\nname = 'f@v1'\nadapter = 'a'", "name"),
        ("[[functions]]\nname = 'f'\nadapter = 'a'\nslo = 3", "slo"),
        ("[[functions]]\nname = 'f'\nadapter = 'a'\ncanary = {v1 = 1}\nweights = {v1 = 100}", "both"),
        ("port = 8000", "port"),
        ("[[functions", "TOML"),
    ],
)
def test_a_file_that_cannot_be_applied_names_the_place(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "functions.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match) as error:
        read_functions(str(path))
    assert str(path) in error.value.message


# --- progress


def transfers() -> list[ChangeEvent]:
    steps = [ChangeEvent(function="f\x1b[2J", step="fetching")]
    steps += [ChangeEvent(function="f", step="fetching", done_bytes=n * 10**6, total_bytes=4 * 10**6) for n in range(4)]
    return [*steps, ChangeEvent(function="f", step="ready"), ChangeEvent(difference=Difference((), 7))]


def test_transfers_are_told_now_and_then_where_nothing_can_be_overwritten() -> None:
    said = StringIO()
    last = follow(iter(transfers()), functions=1, console=Console(file=said))
    assert last.difference == Difference((), 7)
    assert said.getvalue() == "fetching f: 0.0 of 4.0 MB\n"


def test_bars_on_a_terminal() -> None:
    said = StringIO()
    follow(iter(transfers()), functions=1, console=Console(file=said, force_terminal=True, width=100))
    assert "0/1" in said.getvalue() and "\x1b[2J" not in said.getvalue()


def test_an_answer_without_an_end_is_an_error() -> None:
    with pytest.raises(Unavailable):
        follow(iter(transfers()[:-1]), functions=1, console=Console(file=StringIO()))


# --- a real server


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Live]:
    with live("--demo", state_dir=state) as running:
        yield running


class Commands:
    def __init__(self, server: Live, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._server = server
        self._directory = directory
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, "--server", self._server.admin])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def apply(self, text: str, *arguments: str) -> tuple[int, str, str]:
        path = self._directory / "functions.toml"
        path.write_text(text)
        return self.run("apply", "-f", str(path), *arguments)


@pytest.fixture
def commands(server: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Commands:
    for name in ("upper", "reverse"):
        shutil.copytree(adapter_paths()[name], tmp_path / name)
    return Commands(server, tmp_path, capsys)


def declare(name: str, adapter: str, *more: str) -> str:
    return "\n".join(["[[functions]]", f'name = "{name}"', f'adapter = "{adapter}"', *more, ""])


def test_apply_shows_then_does_then_has_nothing_to_do(server: Live, commands: Commands) -> None:
    text = declare("one", "upper", 'tenant = "acme"') + declare("two", "reverse")
    code, out, _ = commands.apply(text, "--dry-run", "--json")
    assert code == 2
    assert [(row["name"], row["actions"]) for row in json.loads(out)["rows"]] == [
        ("one", ["create"]),
        ("two", ["create"]),
    ]
    assert server.chat("one", "x").status_code == 404
    code, out, _ = commands.apply(text)
    assert (code, "applied to 2 functions" in out) == (0, True)
    assert (server.answer("one", "abc"), server.answer("two", "abc")) == ("ABC", "cba")
    assert commands.apply(text, "--dry-run")[0] == 0
    assert json.loads(commands.apply(text, "--json")[1])["applied"] is False


def test_apply_is_all_or_nothing(server: Live, commands: Commands) -> None:
    code, _, err = commands.apply(declare("good", "upper") + declare("bad", "nowhere"))
    assert (code, "'bad' cannot be served" in err) == (1, True)
    assert server.chat("good", "x").status_code == 404
    code, _, err = commands.apply(declare("good", "upper") + declare("odd", "upper", "weights = {v1 = 50}"))
    assert (code, "add up" in err) == (1, True)
    assert server.chat("good", "x").status_code == 404


def test_prune_asks_and_leaves_the_configured(server: Live, commands: Commands) -> None:
    commands.apply(declare("kept", "upper") + declare("leaves", "upper"))
    text = declare("kept", "upper")
    code, _, err = commands.apply(text, "--prune", "--json")
    assert (code, "say --yes" in err) == (1, True)
    assert commands.apply(text, "--prune", "--yes")[0] == 0
    names = {function["name"] for function in httpx.get(f"{server.admin}/admin/functions").json()}
    assert names == {*ADAPTER_NAMES, "kept"}


def test_an_agreed_difference_is_not_carried_out_on_another_state(server: Live, commands: Commands) -> None:
    body = {"functions": [{"name": "late", "adapter": str(adapter_paths()["upper"])}], "dry_run": True}
    shown = httpx.post(f"{server.admin}/admin/apply", json=body, timeout=60).text.splitlines()[-1]
    revision = json.loads(shown)["difference"]["revision"]
    commands.apply(declare("meanwhile", "upper"))
    body |= {"dry_run": False, "revision": revision}
    last = httpx.post(f"{server.admin}/admin/apply", json=body, timeout=60).text.splitlines()[-1]
    assert json.loads(last)["error"]["status"] == 409
    assert server.chat("late", "x").status_code == 404


def test_errors_of_the_admin_api_have_its_shape(server: Live, commands: Commands) -> None:
    commands.apply(declare("e", "upper"))
    for path, body, status in (
        ("rollback", {"name": "nobody"}, 404),
        ("rollback", {"name": "e"}, 400),
        ("rollback", {"name": "e", "to": "v9"}, 404),
        ("rollback", {"name": "e", "to": "9"}, 400),
        ("route", {"name": "e", "weights": {"v1": 101}}, 400),
        ("route", {"name": "e", "weights": {"v1": 50}}, 400),
        ("apply", {"functions": [{"name": "e@v1", "adapter": "/a"}]}, 400),
        ("functions", {"function": {"name": "e@v1", "adapter": "/a"}}, 400),
    ):
        answer = httpx.post(f"{server.admin}/admin/{path}", json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["status"]) == (status, status), (path, body, answer.text)
    for name, status in (("e@v1", 400), ("e@v2", 404), ("nobody@v1", 404)):
        assert httpx.delete(f"{server.admin}/admin/functions/{name}").status_code == status


def test_names_of_versions_on_the_public_port(server: Live, commands: Commands) -> None:
    commands.run("deploy", "p", str(adapter_paths()["upper"]), "--tenant", "acme")
    code, out, _ = commands.run("deploy", "p", str(adapter_paths()["reverse"]), "--weight", "0", "--json")
    assert (code, json.loads(out)["version"], json.loads(out)["tenant"]) == (0, 2, "acme")
    assert [server.answer(name, "abc") for name in ("p", "p@stable", "p@latest", "p@v2")] == [
        "ABC",
        "ABC",
        "cba",
        "cba",
    ]
    listed = [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]
    assert [each for each in listed if each.startswith("p")] == ["p"]
    assert httpx.get(f"{server.url}/v1/models/p@v2").json()["id"] == "p@v2"
    for name in ("p@v3", "p@V2", "demo@v1"):
        refused = server.chat(name, "abc")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    body = {"lora_name": "p@v2", "lora_path": str(adapter_paths()["upper"])}
    assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code == 400
    assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json=body).status_code == 404
    assert server.answer("p@v2", "abc") == "cba"


def test_a_canary_survives_kill_9(state: Path, server: Live, commands: Commands) -> None:
    """The last one of this server: it is killed."""
    commands.run("deploy", "c", str(adapter_paths()["upper"]), "--max-concurrency", "7")
    commands.run("deploy", "c", str(adapter_paths()["reverse"]), "--weight", "0")
    code, out, _ = commands.run("canary", "c", "v2=50")
    assert (code, out) == (0, "c: v1 50 %, v2 50 %\n")
    users = [f"user {i}" for i in range(12)]

    def answers(live_: Live) -> list[str]:
        found = [live_.chat("c", "abc", user=user).json()["choices"][0]["message"]["content"] for user in users]
        return [str(each) for each in found]

    before = answers(server)
    assert set(before) == {"ABC", "cba"}
    assert answers(server) == before
    kept = {each["name"]: each for each in httpx.get(f"{server.admin}/admin/functions").json()}
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with live("--demo", state_dir=state) as again:
        assert {each["name"]: each for each in httpx.get(f"{again.admin}/admin/functions").json()} == kept
        assert answers(again) == before
        after = Commands(again, commands._directory, commands._capsys)
        assert after.run("rollback", "c")[1] == "c: v1 100 %\n"
        assert set(answers(again)) == {"ABC"}
        code, out, _ = after.run("versions", "c", "--json")
        assert [event["action"] for event in json.loads(out)["history"]] == ["rollback", "canary", "deploy", "deploy"]


def test_a_weight_is_read_as_people_write_it() -> None:
    from serverlesslora.cli.versions import parse_weight

    assert parse_weight("v4=10%") == ("v4", 10)
    for wrong in ("v4", "v4=", "v4=x", "v4=101", "v4=-1"):
        with pytest.raises(InvalidRequest):
            parse_weight(wrong)
