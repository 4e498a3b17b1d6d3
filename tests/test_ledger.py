"""The ledger: exactly once, durable against kill -9, honest when the disk is full, and sums that agree."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.errors import ConfigError, InvalidRequest, Overloaded, Unavailable
from serverlesslora.metering import schema, summary
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.prices import Prices, read_prices
from serverlesslora.metering.usage import BYS, STATUSES, RequestUsage, Residency, Status, UsageRow, add_up

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'ipc'}:{ROOT / 'kernels'}"}
TEMPLATE = RequestUsage(
    request_id="cmpl-1",
    function="f",
    tenant="acme",
    domain="demo/tenant:acme",
    backbone="demo",
    digest="d" * 64,
    started_at=1000.5,
    prompt_tokens=11,
    cached_tokens=3,
    completion_tokens=7,
    device_s=0.25,
    queue_s=0.01,
    ttft_s=0.125,
    duration_s=1.5,
    rung="worker",
    status="finished",
    slo_missed=True,
    device="cpu",
)


def used(request_id: str, **changes: Any) -> RequestUsage:
    return msgspec.structs.replace(TEMPLATE, request_id=request_id, **changes)


def held(kind: str, seconds: float, from_at: float = 0.0, **changes: Any) -> Residency:
    plain: dict[str, Any] = {
        "artifact_id": f"{kind}:{changes.get('function') or changes.get('domain') or 'all'}",
        "function": None,
        "tenant": None,
        "domain": None,
        "size_bytes": 100,
        "backbone": "demo",
    }
    return Residency(**{"kind": kind, "seconds": seconds, "from_at": from_at, **plain, **changes})


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[Ledger]:
    ledger = Ledger(path, **options)
    await ledger.startup()
    try:
        yield ledger
    finally:
        await ledger.shutdown()


def with_ledger(path: Path, body: Callable[[Ledger], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with opened(path, **options) as ledger:
            await body(ledger)

    asyncio.run(main())


async def all_requests(ledger: Ledger) -> list[RequestUsage]:
    return list((await ledger.requests(limit=100_000)).requests)


def by_key(rows: list[UsageRow]) -> dict[str | None, UsageRow]:
    return {"idle" if row.idle else row.key: row for row in rows}


texts = st.text(max_size=20)  # hypothesis gives quotes, NUL, emoji, right-to-left; half surrogates have their own test
amounts = st.floats(0, 1e6)
counts = st.integers(0, 2**40)


@settings(max_examples=20, deadline=None)
@given(
    st.builds(
        RequestUsage,
        request_id=texts,
        function=texts,
        tenant=st.none() | texts,
        domain=texts,
        backbone=texts,
        digest=st.none() | texts,
        started_at=st.floats(-1e12, 1e12),
        prompt_tokens=counts,
        cached_tokens=counts,
        completion_tokens=counts,
        device_s=amounts,
        queue_s=amounts,
        ttft_s=st.none() | amounts,
        duration_s=amounts,
        rung=texts,
        status=st.sampled_from(get_args(Status)),
        slo_missed=st.booleans(),
        device=st.none() | texts,
    )
)
def test_whatever_is_recorded_comes_back(usage: RequestUsage) -> None:
    async def body(ledger: Ledger) -> None:
        ledger.begin(usage.request_id, "another", None, "domain")
        assert await ledger.record(usage) == "stored"
        assert await all_requests(ledger) == [usage]

    with tempfile.TemporaryDirectory() as folder:
        with_ledger(Path(folder) / "uñ usual?#%20.db", body)


def test_the_tables_have_the_columns_of_the_rows(tmp_path: Path) -> None:
    with closing(schema.open_for_writing(tmp_path / "u.db")) as db:
        columns = {
            table: tuple(row[1] for row in db.execute(f"PRAGMA table_info({table})"))
            for table in ("requests", "residency")
        }
    assert columns["requests"] == (*RequestUsage.__struct_fields__, "server")
    assert columns["residency"][-1] == "until_at"
    assert set(columns["residency"][:-1]) == set(Residency.__struct_fields__)


def test_a_second_record_is_ignored_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(ledger: Ledger) -> None:
        ledger.begin("a", "f", None, "d")
        assert await ledger.record(used("a", prompt_tokens=1)) == "stored"
        assert await ledger.record(used("a", prompt_tokens=2)) == "duplicate"
        ledger.begin("a", "f", None, "d")  # does not open it again
        ledger.note(used("a", prompt_tokens=3))
        together = await asyncio.gather(*(ledger.record(used(name)) for name in ("b", "c", "c", "a", "d")))
        assert list(together) == ["stored", "stored", "duplicate", "duplicate", "stored"]
        assert {usage.request_id: usage.prompt_tokens for usage in await all_requests(ledger)} == {
            **dict.fromkeys("bcd", 11),
            "a": 1,
        }
        assert ledger.num_duplicates == 4
        assert ledger.problem is None

    with_ledger(tmp_path / "u.db", body)
    assert "recorded twice" in caplog.text


def test_one_bad_row_costs_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(ledger: Ledger) -> None:
        outcomes = await asyncio.gather(
            ledger.record(used("a")),
            ledger.record(used("nan", device_s=math.nan)),
            ledger.record(used("big", prompt_tokens=2**70)),
            ledger.record(used("half", tenant="\ud800!")),
            ledger.record(used("z")),
        )
        assert list(outcomes) == ["stored", "lost", "lost", "stored", "stored"]
        found = {usage.request_id: usage.tenant for usage in await all_requests(ledger)}
        assert found == {"a": "acme", "half": "?!", "z": "acme"}
        assert ledger.num_lost == 2
        assert ledger.problem is None

    with_ledger(tmp_path / "u.db", body)
    assert "cannot be stored" in caplog.text


def num_commits(path: Path) -> int:
    """Frames of the write-ahead log that end a transaction: their header carries the size of the file after it."""
    content = path.with_name(path.name + "-wal").read_bytes()
    page_size = int.from_bytes(content[8:12], "big")
    frames = range(32, len(content), 24 + page_size)
    return sum(int.from_bytes(content[at + 4 : at + 8], "big") != 0 for at in frames)


def test_many_records_of_one_moment_share_transactions(tmp_path: Path) -> None:
    path = tmp_path / "u.db"

    async def body(ledger: Ledger) -> None:
        before = num_commits(path)
        await asyncio.gather(*(ledger.record(used(str(number))) for number in range(1000)))
        assert 1 <= num_commits(path) - before < 100
        assert len(await all_requests(ledger)) == 1000

    with_ledger(path, body)


def test_a_cancelled_wait_does_not_cancel_the_record(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        task = asyncio.create_task(ledger.record(used("a")))
        await asyncio.sleep(0)
        task.cancel()
        assert await ledger.flush()
        assert [usage.request_id for usage in await all_requests(ledger)] == ["a"]

    with_ledger(tmp_path / "u.db", body)


def test_a_closed_ledger_refuses_and_counts(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        ledger.note(used("noted"))
        await ledger.shutdown()
        with pytest.raises(Unavailable):
            ledger.begin("a", "f", None, "d")
        with pytest.raises(Unavailable):
            await ledger.record(used("a"))
        ledger.note(used("b"))
        assert ledger.num_lost == 1
        assert [usage.request_id for usage in await all_requests(ledger)] == ["noted"]

    with_ledger(tmp_path / "u.db", body)
    assert not list(tmp_path.glob("*.lock"))
    assert (tmp_path / "u.db").stat().st_mode & 0o077 == 0


def test_the_queue_is_bounded(tmp_path: Path) -> None:
    """Somebody else holds the file: rows wait, then new requests are refused, then records; nothing given is lost."""
    path = tmp_path / "u.db"

    async def body(ledger: Ledger) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(10):
                ledger.begin(f"open {number}", "f", None, "d")
            with pytest.raises(Overloaded, match="cannot keep up: 10 rows"):
                ledger.begin("one more", "f", None, "d")
            waiting = [asyncio.create_task(ledger.record(used(f"r {number}"))) for number in range(10)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match=r"u\.db"):
                await ledger.record(used("too many"))
            ledger.note(used("too many as well"))
            assert ledger.num_lost == 1
            other.execute("ROLLBACK")
        assert await asyncio.gather(*waiting) == ["stored"] * 10
        assert len(await all_requests(ledger)) == 10
        ledger.begin("welcome again", "f", None, "d")

    with_ledger(path, body, max_waiting=20)


@pytest.fixture
def file_size_limit() -> Any:
    """Sets how long any file may become: a disk that is full, for one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_does_not_stop_the_server(
    tmp_path: Path, file_size_limit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "u.db"

    async def body(ledger: Ledger) -> None:
        assert await ledger.record(used("before")) == "stored"
        file_size_limit(path.with_name("u.db-wal").stat().st_size)
        assert await ledger.record(used("first")) == "waiting"
        assert ledger.problem is not None
        assert str(path) in ledger.problem
        ledger.begin("opened", "f", None, "d")
        assert await ledger.record(used("second")) == "waiting"
        ledger.resident([held("backbone", 5)])
        for number in range(20):
            ledger.begin(f"open {number}", "f", None, "d")  # refuses nobody
            ledger.note(used(f"noted {number}"))
        assert not await ledger.flush()
        assert ledger.num_waiting <= 10
        assert ledger.num_lost > 0
        assert [usage.request_id for usage in await all_requests(ledger)] == ["before"]
        file_size_limit(None)
        assert await ledger.flush()
        assert ledger.problem is None
        assert {"before", "first", "second", "noted 0"} <= {u.request_id for u in await all_requests(ledger)}
        assert await ledger.record(used("after")) == "stored"

    with_ledger(path, body, max_waiting=10, retry_s=1000)
    assert "cannot be written" in caplog.text


def test_writing_is_tried_again_by_itself(tmp_path: Path, file_size_limit: Any) -> None:
    async def body(ledger: Ledger) -> None:
        await ledger.record(used("before"))
        file_size_limit(1000)
        assert await ledger.record(used("a")) == "waiting"
        file_size_limit(None)
        while len(await all_requests(ledger)) < 2:
            await asyncio.sleep(0.005)

    with_ledger(tmp_path / "u.db", body, retry_s=0.01)


# -- crashes --

CHILD = """
import asyncio, itertools, msgspec, sys
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.usage import RequestUsage

TEMPLATE = msgspec.json.decode(sys.argv[3], type=RequestUsage)

async def client(ledger, name):
    for number in itertools.count():
        request_id = f"{name}.{number}"
        ledger.begin(request_id, "f", "acme", "d")
        await ledger.record(msgspec.structs.replace(TEMPLATE, request_id=request_id))
        print(request_id, flush=True)

async def main(path, round_):
    ledger = Ledger(path)
    await ledger.startup()
    for number in range(5):
        ledger.begin(f"{round_}.hangs.{number}", "f", "acme", "d", digest="cafe", started_at=77.0)
    await ledger.flush()
    print("ready", flush=True)
    await asyncio.gather(*(client(ledger, f"{round_}.{number}") for number in range(8)))

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


@pytest.mark.parametrize("num_rounds", [10, pytest.param(150, marks=pytest.mark.slow)])
def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, num_rounds: int) -> None:
    path = tmp_path / "u.db"
    random_ = random.Random(20260101)
    acknowledged: set[str] = set()
    for round_ in range(num_rounds):
        acknowledged |= recorded_until_killed(path, round_, random_.randrange(1, 400))
        with closing(schema.open_for_reading(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        with_ledger(path, partial(check_after_kill, round_=round_, acknowledged=acknowledged))
        assert statuses(path) == {"finished", "interrupted"}
    assert not list(tmp_path.glob("*.lock"))


def recorded_until_killed(path: Path, round_: int, num_lines: int) -> set[str]:
    """Ids a server said are recorded before it was killed with others on their way."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(round_), msgspec.json.encode(TEMPLATE).decode()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            if round_ == 0:  # the open requests of a server that lives are nobody else's business
                with_ledger(path, found_nothing)
                assert "interrupted" not in statuses(path)
            lines = [child.stdout.readline() for _ in range(num_lines)]
        finally:
            child.kill()
        lines += child.stdout  # printed is acknowledged, even when nobody had read it yet
    return {line.strip() for line in lines if line.endswith("\n")}


async def check_after_kill(ledger: Ledger, round_: int, acknowledged: set[str]) -> None:
    requests = await all_requests(ledger)
    finished = [usage.request_id for usage in requests if usage.status == "finished"]
    assert len(finished) == len(set(finished))
    assert acknowledged <= set(finished)
    cut_off = {usage.request_id: usage for usage in requests if usage.status == "interrupted"}
    assert {f"{round_}.hangs.{number}" for number in range(5)} <= cut_off.keys()
    assert ledger.num_interrupted == sum(name.startswith(f"{round_}.") for name in cut_off)
    assert cut_off[f"{round_}.hangs.0"].digest == "cafe"


async def found_nothing(ledger: Ledger) -> None:
    assert ledger.num_interrupted == 0


def statuses(path: Path) -> set[str]:
    with closing(schema.open_for_reading(path)) as db:
        return {status for (status,) in db.execute("SELECT DISTINCT status FROM requests")}


def test_another_process_reads_while_this_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    code = (
        "import sys, msgspec; from serverlesslora.metering import summary;"
        "print(msgspec.json.encode(summary.usage(sys.argv[1], by='tenant')).decode())"
    )

    async def body(ledger: Ledger) -> None:
        await ledger.record(used("a"))
        with closing(schema.open_for_reading(path)) as db:
            db.execute("BEGIN")
            assert db.execute("SELECT count(*) FROM requests").fetchone() == (1,)
            assert await ledger.record(used("b")) == "stored"  # a reader holds up no writer
            assert db.execute("SELECT count(*) FROM requests").fetchone() == (1,)
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code,
            str(path),
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=ENVIRONMENT,
        )
        out, _ = await child.communicate()
        assert [(row["key"], row["requests"]) for row in json.loads(out)] == [("acme", 2)]

    with_ledger(path, body)
    assert [row.requests for row in summary.usage(path)] == [2]  # and without a server


def test_two_servers_share_a_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "u.db") as one, opened(tmp_path / "u.db") as two:
            outcomes = await asyncio.gather(*(ledger.record(used(f"{i}")) for i in range(50) for ledger in (one, two)))
            assert sorted(outcomes) == ["duplicate"] * 50 + ["stored"] * 50
            one.begin("open", "f", None, "d")
            await one.flush()
            async with opened(tmp_path / "u.db") as three:
                assert three.num_interrupted == 0
        async with opened(tmp_path / "u.db") as four:  # it left without ending the request
            assert four.num_interrupted == 1

    asyncio.run(main())


# -- files that cannot be used --


def startup_error(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        with_ledger(path, found_nothing)
    return caught.value.message


def test_a_damaged_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    path.write_bytes(b"these are not the bytes of a database" * 1000)
    assert str(path) in startup_error(path)
    assert "move it" in startup_error(path)
    with pytest.raises(ConfigError, match="damaged"):
        summary.usage(path)


def test_damage_in_the_middle_is_found(tmp_path: Path) -> None:
    path = tmp_path / "u.db"

    async def fill(ledger: Ledger) -> None:
        for number in range(300):
            ledger.note(used(f"{number}"))

    with_ledger(path, fill)
    content = bytearray(path.read_bytes())
    content[4096:-4096] = os.urandom(len(content) - 8192)
    path.write_bytes(content)
    assert str(path) in startup_error(path)


def test_a_newer_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "u.db"

    async def one(ledger: Ledger) -> None:
        await ledger.record(used("a"))

    async def still_there(ledger: Ledger) -> None:
        assert await all_requests(ledger) == [used("a")]

    with_ledger(path, one)
    with monkeypatch.context() as newer:
        newer.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, ("CREATE TABLE colours (name TEXT)",)))
        newer.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(ConfigError, match=f"version {schema.VERSION - 1}, this program reads {schema.VERSION}"):
            summary.usage(path)
        with_ledger(path, still_there)  # brought up to date
        with_ledger(path, still_there)
    content = path.read_bytes()
    assert "newer" in startup_error(path)
    assert str(path) in startup_error(path)
    assert path.read_bytes() == content


def test_a_failed_migration_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "u.db"
    with_ledger(path, found_nothing)
    with monkeypatch.context() as broken:
        broken.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, ("CREATE TABLE colours (name TEXT)", "NONSENSE")))
        broken.setattr(schema, "VERSION", schema.VERSION + 1)
        assert str(path) in startup_error(path)
    with_ledger(path, found_nothing)
    with closing(schema.open_for_reading(path)) as db:
        assert not db.execute("SELECT * FROM sqlite_master WHERE name = 'colours'").fetchall()


def test_a_database_of_others_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    assert "bookmarks" in startup_error(path)
    (tmp_path / "file").touch()
    assert "cannot make" in startup_error(tmp_path / "file" / "u.db")
    assert str(tmp_path) in startup_error(tmp_path)
    with pytest.raises(ConfigError, match="there is no usage ledger"):
        summary.usage(tmp_path / "none.db")


# -- sums --

PRICES: Prices = msgspec.convert(
    {
        **msgspec.to_builtins(read_prices()),
        "tokens": {"prompt": 0.5, "output": 1.5, "cached": 0.125},
    },
    Prices,
)

names = st.sampled_from(["f", "g", "h"])
tenants = st.none() | st.sampled_from(["t", "u"])
requests_ = st.builds(
    lambda **changes: used("", **changes),
    function=names,
    tenant=tenants,
    domain=st.sampled_from(["d", "e"]),
    started_at=st.floats(0, 100),
    prompt_tokens=st.integers(0, 1000),
    completion_tokens=st.integers(0, 1000),
    device_s=st.floats(0, 10),
    status=st.sampled_from(STATUSES),
    slo_missed=st.booleans(),
    rung=st.sampled_from(["hot", "worker"]),
    device=st.sampled_from([None, "cpu", "NVIDIA H200"]),
)
residencies = st.builds(
    held,
    st.sampled_from(["backbone", "worker", "adapter", "process"]),
    st.floats(0, 50),
    st.floats(0, 100),
    function=st.none() | names,
    tenant=tenants,
    domain=st.none() | st.sampled_from(["d", "e"]),
    size_bytes=st.integers(0, 10**10),
    tier=st.sampled_from(["host", "device"]),
    backbone=st.sampled_from(["demo", "other", None]),
)
windows = st.sampled_from([(None, None), (20.0, None), (None, 70.0), (30.0, 60.0)])


@settings(max_examples=20, deadline=None)
@given(st.lists(requests_, max_size=12), st.lists(residencies, max_size=12), windows)
def test_all_sums_agree(
    requests: list[RequestUsage], memory: list[Residency], window: tuple[float | None, float | None]
) -> None:
    since, until = window
    low, high = since if since is not None else -math.inf, until if until is not None else math.inf

    async def body(ledger: Ledger) -> None:
        for number, usage in enumerate(requests):
            ledger.note(msgspec.structs.replace(usage, request_id=str(number)))
        ledger.begin("still open", "f", "t", "d", started_at=50.0)
        ledger.resident(memory)
        await ledger.flush()
        single = (await ledger.requests(since=since, until=until, limit=1000)).requests
        inside = [usage for usage in requests if low <= usage.started_at < high]
        assert len(single) == len(inside)
        byte_s = sum(
            item.size_bytes * max(0.0, min(item.from_at + item.seconds, high) - max(item.from_at, low))
            for item in memory
        )
        money = [PRICES.request_money(usage) for usage in single]
        for by in BYS:
            rows = await ledger.usage(by=by, since=since, until=until)
            assert len({(row.idle, row.key) for row in rows}) == len(rows)
            total = add_up(rows)
            assert total.requests == len(inside)
            assert sum(getattr(total, status) for status in STATUSES) == len(inside)
            for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "slo_missed"):
                assert getattr(total, name) == sum(getattr(usage, name) for usage in inside)
            for name in ("device_s", "duration_s", "queue_s"):
                assert getattr(total, name) == pytest.approx(sum(getattr(usage, name) for usage in inside))
            assert sum(total.rungs.values()) == len(inside)
            assert sum(total.device_s_of.values()) == pytest.approx(total.device_s)
            priced = [PRICES.row_money(row) for row in rows]
            assert sum(row.device for row in priced) == pytest.approx(sum(one.device for one in money))
            assert sum(row.charged or 0 for row in priced) == pytest.approx(sum(one.charged or 0 for one in money))
            assert sum(total.byte_s.values()) == pytest.approx(byte_s, rel=1e-9, abs=1e-3)
            for row in rows:
                assert all(value >= -1e-3 for value in row.byte_s.values())
                expected = [usage for usage in inside if not row.idle and getattr(usage, by) == row.key]
                assert row.requests == len(expected)

    with tempfile.TemporaryDirectory() as folder:
        with_ledger(Path(folder) / "u.db", body)


def byte_s(path: Path, memory: list[Residency], **options: Any) -> dict[str | None, float]:
    async def body(ledger: Ledger) -> None:
        ledger.resident(memory)

    if memory:
        with_ledger(path, body)
    rows = by_key(summary.usage(path, **options))
    return {key: round(sum(row.byte_s.values()), 6) for key, row in rows.items()}


def test_a_shared_backbone_is_split_by_the_time_of_workers(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    memory = [
        held("backbone", 100),
        held("worker", 20, from_at=10, function="f", domain="df", tenant="t", size_bytes=0),
        held("worker", 40, from_at=20, function="g", domain="dg", size_bytes=1),
        held("worker", 30, function="other", domain="do", size_bytes=0, backbone="another"),
    ]
    # Workers were there for 50 of 100 seconds, f's for 20 and g's for 40 of them.
    assert byte_s(path, memory) == {
        "f": pytest.approx(5000 / 3),
        "g": pytest.approx(10000 / 3 + 40),
        "other": 0,
        "idle": 5000,
    }
    assert byte_s(path, [], by="tenant") == {
        "t": pytest.approx(5000 / 3),
        None: pytest.approx(10000 / 3 + 40),
        "idle": 5000,
    }
    # In the first 20 seconds only f's was there, for 10; half of a window's time is idle.
    assert byte_s(path, [], until=20.0) == {"f": 1000, "other": 0, "idle": 1000}
    assert byte_s(path, [], since=20.0, until=30.0) == {"f": 500, "g": 510, "other": 0}
    assert byte_s(path, [], since=60.0) == {"idle": 4000}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=6))
def test_idle_is_the_time_without_any_worker(stretches: list[tuple[int, int]]) -> None:
    """However the workers' times overlap, contain or repeat each other."""
    memory = [held("backbone", 32)] + [
        held("worker", seconds, start, function=f"f{number % 3}", domain="d", size_bytes=0)
        for number, (start, seconds) in enumerate(stretches)
    ]
    busy = {second for start, seconds in stretches for second in range(start, start + seconds)}
    with tempfile.TemporaryDirectory() as folder:
        found = byte_s(Path(folder) / "u.db", memory)
    assert found.pop("idle") == pytest.approx(100 * (32 - len(busy)))
    total_s = sum(seconds for _, seconds in stretches)
    for name, share in found.items():
        own_s = sum(seconds for number, (_, seconds) in enumerate(stretches) if f"f{number % 3}" == name)
        assert share == pytest.approx(100 * len(busy) * own_s / total_s if total_s else 0, abs=1e-5)


def test_a_worker_of_a_tenant_is_split_by_its_adapters(tmp_path: Path) -> None:
    memory = [
        held("backbone", 100),
        held("worker", 100, domain="d", tenant="t", size_bytes=8),
        held("adapter", 75, domain="d", tenant="t", function="f", size_bytes=0),
        held("adapter", 25, domain="d", tenant="t", function="g", size_bytes=0),
    ]
    assert byte_s(tmp_path / "u.db", memory) == {"f": 8100, "g": 2700}
    alone = [held("backbone", 10), held("worker", 10, domain="d", tenant="t")]  # without any adapter: the tenant's
    assert byte_s(tmp_path / "v.db", alone) == {None: 2000}
    assert byte_s(tmp_path / "v.db", [], by="tenant") == {"t": 2000}
    assert byte_s(tmp_path / "v.db", [], by="domain") == {"d": 2000}


def test_copies_in_two_tiers_are_split_each(tmp_path: Path) -> None:
    memory = [
        held("backbone", 100, tier="host"),
        held("backbone", 50, tier="device"),
        held("worker", 50, function="f", domain="d", size_bytes=0),
    ]
    assert byte_s(tmp_path / "u.db", memory) == {"f": 5000 + 5000, "idle": 5000}


# -- pages --


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1.0, 2.0, 2.5]), texts), unique_by=lambda pair: pair[1], max_size=12),
    st.integers(1, 5),
)
def test_pages_show_everything_once(entries: list[tuple[float, str]], limit: int) -> None:
    async def body(ledger: Ledger) -> None:
        for at, name in entries:
            ledger.note(used(name, started_at=at))
        await ledger.flush()
        found: list[tuple[float, str]] = []
        page = await ledger.requests(limit=limit)
        while True:
            assert len(page.requests) <= limit
            found += [(usage.started_at, usage.request_id) for usage in page.requests]
            if page.next is None:
                break
            assert page.next.isascii() and page.requests
            ledger.note(used(f"newer {len(found)} {limit} {page.next}", started_at=9.0))  # moves no page
            await ledger.flush()
            page = await ledger.requests(limit=limit, after=page.next)
        assert [at for at, _ in found] == sorted((at for at, _ in entries), reverse=True)
        assert sorted(found) == sorted(entries)

    with tempfile.TemporaryDirectory() as folder:
        with_ledger(Path(folder) / "u.db", body)


def test_a_wrong_page_is_refused(tmp_path: Path) -> None:
    with_ledger(tmp_path / "u.db", found_nothing)
    with pytest.raises(InvalidRequest, match="after="):
        summary.requests(tmp_path / "u.db", after="what")
