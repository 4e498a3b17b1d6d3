"""`serverlesslora keys`: API keys of a state directory, made, listed and revoked whether its server runs or not."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from serverlesslora.cli.client import plain_console
from serverlesslora.cli.serve import Subparsers
from serverlesslora.config import default_state_dir
from serverlesslora.errors import InvalidRequest
from serverlesslora.tenancy.key import Grant, Key, Limits
from serverlesslora.tenancy.secret import PREFIX, id_of
from serverlesslora.tenancy.store import KEYS_FILE, KeyStore

LONGEST_S = 100 * 365 * 86400
_SPANS_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"([0-9]{1,6})([mhdw])")

DESCRIPTION = """\
From the first key on, the server whose state directory this is answers nobody without one, and from the first admin key
on neither does its admin API. A running server sees a change within two seconds."""


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser("keys", help="API keys: make, list, revoke", description=DESCRIPTION)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    create = actions.add_parser("create", help="make a key; it is printed once and never again")
    create.add_argument("--tenant", metavar="T", help="whose functions it may ask; only an admin key can do without")
    create.add_argument(
        "--functions", metavar="'a,b-*'", help="names or patterns of those functions [all of the tenant's]"
    )
    create.add_argument("--allow-base", action="store_true", help="it may ask the backbones themselves")
    create.add_argument(
        "--admin",
        action="store_true",
        help="the operator's: the admin API, loading and unloading adapters; without --tenant it sees every function",
    )
    create.add_argument("--expires", metavar="30d", help="a span from now: 90m, 12h, 30d, 4w [never]")
    create.add_argument("--rps", type=float, metavar="X", help="requests per second [no limit]")
    create.add_argument("--burst", type=int, metavar="N", help="requests at once after a pause [a second's worth]")
    create.add_argument("--concurrent", type=int, metavar="N", help="requests open at once [no limit]")
    create.add_argument("--tokens-per-minute", type=int, metavar="N", help="prompt and output tokens [no limit]")
    create.add_argument("--name", metavar="N", help="what you will know it by")
    create.set_defaults(run=run_create)

    list_ = actions.add_parser("list", help="list the keys, without their secrets")
    list_.set_defaults(run=run_list)

    revoke = actions.add_parser("revoke", help="end a key for ever")
    revoke.add_argument("id", metavar="ID", help="its id, as `keys list` shows it")
    revoke.set_defaults(run=run_revoke)

    for action in (create, list_, revoke):
        default = default_state_dir()
        action.add_argument("--state-dir", default=default, metavar="DIR", help=f"the server's [{default}]")
        action.add_argument("--json", action="store_true", help="print JSON")


def run_create(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    expires_at = None if arguments.expires is None else time.time() + parse_span(arguments.expires)
    if arguments.name is not None and not (arguments.name.isprintable() and 0 < len(arguments.name) <= 128):
        raise InvalidRequest(f"--name {arguments.name!r}: give 1 to 128 printable characters")
    made = store.create(_grant(arguments), name=arguments.name, expires_at=expires_at)
    if arguments.json:
        print(msgspec.json.encode({"key": made.text, **_details(made.key)}).decode())
    else:
        print(made.text)
        print(f"key {made.key.id} in {store.path}; it cannot be shown again", file=sys.stderr)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    keys = store.list_keys()
    if arguments.json:
        print(msgspec.json.encode([_details(key) for key in keys]).decode())
    elif keys:
        plain_console().print(_table(keys))
    else:
        print(f"no keys in {store.path}: nobody needs one")
    return 0


def run_revoke(arguments: argparse.Namespace) -> int:
    # Who has only the leaked key at hand pastes that. Its secret must not come back in a message.
    key_id = id_of(arguments.id) or arguments.id.removeprefix(PREFIX)[:16]
    key = _store(arguments).revoke(key_id)
    print(msgspec.json.encode(_details(key)).decode() if arguments.json else f"revoked {key.id}")
    return 0


def parse_span(text: str) -> float:
    """Seconds. Raises InvalidRequest."""
    found = _SPAN.fullmatch(text)
    seconds = int(found[1]) * _SPANS_S[found[2]] if found else 0
    if not 0 < seconds <= LONGEST_S:
        raise InvalidRequest(f"--expires {text!r}: give a span from now, at most a century: 90m, 12h, 30d, 4w")
    return float(seconds)


def _grant(arguments: argparse.Namespace) -> Grant:
    limits = {name: getattr(arguments, name) for name in Limits.__struct_fields__}
    wanted: dict[str, Any] = {
        "tenant": arguments.tenant,
        "allow_base": arguments.allow_base,
        "admin": arguments.admin,
        "limits": {name: value for name, value in limits.items() if value is not None},
    }
    if arguments.functions is not None:
        # An empty list would mean all of them, which is not what somebody who wrote "" or "a,,b" has in mind.
        wanted["functions"] = [pattern.strip() for pattern in arguments.functions.split(",")]
    try:
        return msgspec.convert(wanted, Grant)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"no such key can be made: {error}") from None


def _store(arguments: argparse.Namespace) -> KeyStore:
    return KeyStore(Path(arguments.state_dir).expanduser() / KEYS_FILE)


def _details(key: Key) -> dict[str, Any]:
    """Flat, and with every field."""
    grant, limits = key.grant, key.grant.limits
    known = msgspec.structs.asdict(key) | msgspec.structs.asdict(grant) | msgspec.structs.asdict(limits)
    return {name: value for name, value in known.items() if name not in ("grant", "limits")} | {
        "state": key.state(time.time())
    }


def _table(keys: list[Key]) -> Table:
    table = Table(
        "id", "name", "tenant", "functions", "also", "limits", "created (UTC)", "last used", "expires", "state"
    )
    now = time.time()
    for key in keys:
        grant = key.grant
        also = [text for text, is_so in (("base", grant.allow_base), ("admin", grant.admin)) if is_so]
        functions = "all" if not grant.functions else ", ".join(grant.functions)
        times = map(_time, (key.created_at, key.last_used_at, key.expires_at))
        texts = (key.id, key.name or "", grant.tenant or "all", functions, ", ".join(also), _limits(grant.limits))
        table.add_row(*texts, *times, key.state(now))
    return table


def _limits(limits: Limits) -> str:
    parts = (
        None if limits.rps is None else f"{limits.rps:g}/s (burst {limits.burst_size})",
        None if limits.concurrent is None else f"{limits.concurrent} at once",
        None if limits.tokens_per_minute is None else f"{limits.tokens_per_minute} tok/min",
    )
    return ", ".join(part for part in parts if part)


def _time(at: float | None) -> str:
    return "" if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M")
