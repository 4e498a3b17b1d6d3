"""API keys: what is stored of them, what they are good for, and what a running server knows of the file."""

from __future__ import annotations

import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.errors import ConfigError, NotFound, Unauthorized, Unavailable
from serverlesslora.tenancy import keyring
from serverlesslora.tenancy.key import Grant, Limits
from serverlesslora.tenancy.keyring import NOTE_EVERY_S, Keyring
from serverlesslora.tenancy.secret import NOBODY, Stored, id_of, is_the_one, new_secret
from serverlesslora.tenancy.store import KEYS_FILE, KeyStore
from tests.server import ROOT, wait_until

ACME = Grant(tenant="acme")
OPERATOR = Grant(admin=True)


class Clock:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> KeyStore:
    return KeyStore(tmp_path / "state" / KEYS_FILE, clock=clock)


@pytest.fixture
def ring(store: KeyStore, clock: Clock) -> Iterator[Keyring]:
    """Started by the test; it looks as often as it can."""
    ring = Keyring(store.path, look_every_s=0.005, clock=clock)
    yield ring
    ring.shutdown()


def is_let_in(ring: Keyring, text: str | None) -> bool:
    try:
        ring.check(text)
    except Unauthorized:
        return False
    return True


# --- secrets


def test_a_secret_is_recognised_and_nothing_else_is() -> None:
    secret = new_secret()
    assert id_of(secret.text) == secret.id
    assert is_the_one(secret.text, secret.stored)
    assert not is_the_one(new_secret().text, secret.stored)
    assert not is_the_one(secret.text, Stored(new_secret().stored.salt, secret.stored.digest))
    assert not is_the_one(secret.text, NOBODY)


def test_secrets_are_256_bits_and_never_the_same() -> None:
    made = [new_secret() for _ in range(200)]
    assert len({each.id for each in made}) == len({each.stored.salt for each in made}) == 200
    assert {len(each.text) for each in made} == {len("sk-slora-") + 16 + 1 + 43}  # 43 characters of base64: 256 bits


@given(st.text())
def test_what_is_no_key_has_no_id(text: str) -> None:
    assert id_of(text) is None
    assert not is_the_one(text.encode("utf-8", "replace").decode(), NOBODY)


@pytest.mark.parametrize(
    "change", [str.upper, lambda text: text + "x", lambda text: text[:-1], lambda text: text + "\n"]
)
def test_a_changed_key_has_no_id(change: object) -> None:
    assert callable(change)
    assert id_of(change(new_secret().text)) is None


# --- grants


def test_a_tenants_key_asks_its_tenants_functions() -> None:
    assert ACME.may_ask("f", "acme")
    assert not ACME.may_ask("f", "other")
    assert not ACME.may_ask("f", None)
    assert not ACME.may_ask_backbones
    assert Grant(tenant="acme", allow_base=True).may_ask_backbones


def test_patterns_narrow_it() -> None:
    grant = Grant(tenant="acme", functions=("legal", "sales-*", "v[12]"))
    asked = ["legal", "legal2", "Legal", "sales-eu", "sales", "v1", "v3", "x/sales-eu"]
    assert [name for name in asked if grant.may_ask(name, "acme")] == ["legal", "sales-eu", "v1"]
    assert not grant.may_ask("legal", "other")


def test_the_operators_key_asks_everything() -> None:
    assert OPERATOR.may_ask("f", "acme") and OPERATOR.may_ask("f", None) and OPERATOR.may_ask_backbones
    narrowed = Grant(tenant="acme", admin=True)
    assert narrowed.may_ask("f", "acme") and not narrowed.may_ask("f", None) and not narrowed.may_ask_backbones


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"tenant": ""},
        {"tenant": " acme"},
        {"tenant": "a\x1b[31m"},
        {"tenant": "acme", "functions": [""]},
        {"tenant": "acme", "functions": ["a "]},
        {"admin": True, "functions": ["a"]},
        {"admin": True, "allow_base": True},
        {"tenant": "acme", "limits": {"rps": 0}},
        {"tenant": "acme", "limits": {"rps": float("nan")}},
        {"tenant": "acme", "limits": {"rps": float("inf")}},
        {"tenant": "acme", "limits": {"burst": 3}},
        {"tenant": "acme", "limits": {"concurrent": 0}},
        {"tenant": "acme", "limits": {"tokens_per_minute": 0}},
        {"tenant": "acme", "may_fly": True},
    ],
)
def test_grants_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, Grant)


# --- the file


def test_keys_come_back_as_they_were_made(store: KeyStore, clock: Clock) -> None:
    limits = Limits(rps=5.0, burst=7, concurrent=2, tokens_per_minute=900)
    grant = Grant(tenant="acme", functions=("a", "b-*"), allow_base=True, limits=limits)
    first = store.create(grant, name="ci", expires_at=clock.now + 5)
    clock.now += 1
    second = store.create(OPERATOR)
    assert store.list_keys() == [first.key, second.key]
    assert (first.key.grant, first.key.name, first.key.state(clock.now)) == (grant, "ci", "valid")
    assert first.key.state(clock.now + 4) == "expired"


def test_no_secret_is_in_the_file_and_nobody_else_may_read_it(store: KeyStore) -> None:
    secret = store.create(ACME).text[-20:]
    with closing(sqlite3.connect(store.path)) as held:  # while somebody has it open, the log is there too
        held.execute("SELECT * FROM keys").fetchall()
        secrets = [secret, store.create(ACME).text[-20:]]
        files = list(store.path.parent.iterdir())
        assert len(files) >= 2
        for file in files:
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert not any(each.encode() in file.read_bytes() for each in secrets)


def test_revoking(store: KeyStore, clock: Clock) -> None:
    key = store.create(ACME).key
    clock.now += 10
    assert store.revoke(key.id).revoked_at == clock.now
    clock.now += 10
    assert store.revoke(key.id).revoked_at == clock.now - 10  # for ever, and since the first time
    assert [key.state(clock.now) for key in store.list_keys()] == ["revoked"]
    with pytest.raises(NotFound, match="keys list"):
        store.revoke("nothing")


def test_without_a_file_there_are_no_keys_and_asking_makes_none(store: KeyStore) -> None:
    assert store.list_keys() == []
    with pytest.raises(NotFound):
        store.revoke("nothing")
    assert not store.path.parent.exists()


def test_files_that_are_not_ours(store: KeyStore) -> None:
    store.path.parent.mkdir()
    store.path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match="damaged"):
        store.list_keys()
    store.path.unlink()
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("CREATE TABLE recipes (x)")
    with pytest.raises(ConfigError, match="another program"):
        store.create(ACME)
    store.path.unlink()
    store.create(ACME)
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(ConfigError, match="newer version"):
        store.create(ACME)


MAKER = """
import itertools, sys
from pathlib import Path
from serverlesslora.tenancy.key import Grant
from serverlesslora.tenancy.store import KeyStore
store = KeyStore(Path(sys.argv[1]))
for number in itertools.count():
    made = store.create(Grant(tenant="acme"))
    print("made", made.text, flush=True)
    if number % 2:
        print("revoked", store.revoke(made.key.id).id, flush=True)
"""


def test_what_was_told_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    with subprocess.Popen(
        [sys.executable, "-c", MAKER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as maker:
        assert maker.stdout is not None
        told = [maker.stdout.readline() for _ in range(25)]
        maker.send_signal(signal.SIGKILL)
        told += [line for line in maker.stdout if line.endswith("\n")]
    assert maker.returncode == -signal.SIGKILL
    keys = {key.id: key for key in KeyStore(path).list_keys()}
    for line in told:
        what, text = line.split()
        key_id = text if what == "revoked" else id_of(text)
        assert key_id in keys
        assert what == "made" or keys[key_id].revoked_at is not None
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- what a running server knows


def test_without_keys_nobody_needs_one(ring: Keyring) -> None:
    ring.startup()
    assert ring.check(None) is None and ring.check("anything") is None and ring.check_admin(None) is None
    assert not ring.is_required


def test_the_first_key_closes_the_door_and_revoking_it_does_not_open_it(store: KeyStore, ring: Keyring) -> None:
    ring.startup()
    made = store.create(ACME)
    wait_until(lambda: ring.is_required)
    assert ring.check(made.text) == made.key
    store.revoke(made.key.id)
    wait_until(lambda: not is_let_in(ring, made.text))
    assert not is_let_in(ring, None)
    assert ring.problem is None


def test_a_server_that_starts_knows_what_is_there(store: KeyStore, ring: Keyring) -> None:
    store.revoke(store.create(ACME).key.id)
    ring.startup()
    assert not is_let_in(ring, None)
    assert ring.check_admin(None) is None  # there never was an admin key


def test_the_admin_api_needs_a_key_from_the_first_admin_key_on(store: KeyStore, ring: Keyring) -> None:
    tenants, operators = store.create(ACME), store.create(OPERATOR)
    ring.startup()
    assert ring.check_admin(operators.text) == operators.key
    for text in (None, tenants.text, operators.text[:-1]):
        with pytest.raises(Unauthorized):
            ring.check_admin(text)
    store.revoke(operators.key.id)
    wait_until(lambda: not is_let_in(ring, operators.text))
    with pytest.raises(Unauthorized):
        ring.check_admin(None)


def test_expiry(store: KeyStore, ring: Keyring, clock: Clock) -> None:
    made = store.create(ACME, expires_at=clock.now + 60)
    ring.startup()
    clock.now += 59.9
    assert is_let_in(ring, made.text)
    clock.now += 0.1
    assert not is_let_in(ring, made.text)


def test_the_right_id_with_a_wrong_secret(store: KeyStore, ring: Keyring) -> None:
    made, other = store.create(ACME), store.create(ACME)
    ring.startup()
    swapped = made.text[: -len("x" * 43)] + other.text[-43:]
    assert id_of(swapped) == made.key.id
    assert not is_let_in(ring, swapped)


def last_used(store: KeyStore) -> float | None:
    return store.list_keys()[0].last_used_at


def test_use_is_noted_at_most_once_a_minute(store: KeyStore, ring: Keyring, clock: Clock) -> None:
    made = store.create(ACME)
    ring.startup()
    assert last_used(store) is None
    first = clock.now
    ring.check(made.text)
    wait_until(lambda: last_used(store) == first)
    clock.now += NOTE_EVERY_S - 1
    ring.check(made.text)
    assert not ring._used  # nothing for the thread to write
    clock.now += 1
    ring.check(made.text)
    wait_until(lambda: last_used(store) == clock.now)


def test_use_is_written_when_the_server_ends(store: KeyStore, clock: Clock) -> None:
    made = store.create(ACME)
    ring = Keyring(store.path, look_every_s=3600, clock=clock)
    ring.startup()
    ring.check(made.text)
    ring.shutdown()
    assert last_used(store) == clock.now


def test_a_file_that_is_deleted_opens_nothing(store: KeyStore, ring: Keyring) -> None:
    made = store.create(ACME)
    ring.startup()
    for file in store.path.parent.iterdir():
        file.unlink()
    wait_until(lambda: ring.problem is not None)
    assert not is_let_in(ring, None) and is_let_in(ring, made.text)
    again = store.create(ACME)  # a new file in its place
    wait_until(lambda: is_let_in(ring, again.text))
    assert not is_let_in(ring, made.text)
    wait_until(lambda: ring.problem is None)


def test_a_file_that_broke_keeps_the_door_as_it_was(store: KeyStore, ring: Keyring) -> None:
    made = store.create(ACME)
    ring.startup()
    fresh = store.path.with_name("fresh")
    fresh.write_bytes(b"no database at all" * 1000)
    fresh.rename(store.path)
    wait_until(lambda: ring.problem is not None)
    assert not is_let_in(ring, None) and is_let_in(ring, made.text)


def test_a_file_that_could_never_be_read_lets_nobody_in(store: KeyStore, ring: Keyring) -> None:
    ring.startup()
    store.path.parent.mkdir()
    fresh = store.path.with_name("fresh")
    fresh.write_bytes(b"no database at all" * 1000)
    fresh.rename(store.path)
    wait_until(lambda: ring.problem is not None)
    with pytest.raises(Unavailable):
        ring.check(None)
    store.path.unlink()
    wait_until(lambda: ring.problem is None)
    assert is_let_in(ring, None)  # somebody took it away, and no key was ever seen
    made = store.create(ACME)
    wait_until(lambda: ring.is_required)
    assert is_let_in(ring, made.text) and not is_let_in(ring, None)


def test_a_server_does_not_start_on_a_file_it_cannot_read(store: KeyStore, ring: Keyring) -> None:
    store.path.parent.mkdir()
    store.path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match="damaged"):
        ring.startup()


def test_a_running_server_looks_often_enough() -> None:
    assert keyring.LOOK_EVERY_S <= 1.0
