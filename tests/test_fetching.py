"""Adapters from far away, over real connections: cut, stalled, lying and killed transfers; a hub, and buckets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from serverlesslora.adapters.files import CONFIG, WEIGHTS
from serverlesslora.adapters.hosts import HostRules, parse_hosts
from serverlesslora.adapters.places import Bucket, Site
from serverlesslora.adapters.quota import Needed
from serverlesslora.adapters.remote import Remote, Transient
from serverlesslora.adapters.sources import BucketSource, Source, WebSource
from serverlesslora.adapters.store import AdapterStore, StoredAdapter
from serverlesslora.adapters.transfer import Transfer, TransferLimits
from serverlesslora.adapters.web import CONNECTIONS, Timeouts, Web
from serverlesslora.errors import AdapterChanged, AdapterInvalid, InvalidRequest, NotFound, StorageFull, Unavailable
from tests.adapter_host import COMMIT, AdapterHost, adapter_host
from tests.server import ROOT, free_port, wait_until

WEIGHTS_BYTES = bytes(range(256)) * 2048  # 512 KiB
QUICK = Timeouts(connect_s=2, read_s=2)
PATH = f"/a/{WEIGHTS}"
HUB_PATH = f"/owner/repo/resolve/{COMMIT}/sub/{WEIGHTS}"


def make_adapter(path: Path, weights: bytes = WEIGHTS_BYTES, **config: object) -> Path:
    path.mkdir(parents=True)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    (path / WEIGHTS).write_bytes(weights)
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


@pytest.fixture
def digest(adapter: Path, tmp_path: Path) -> str:
    return AdapterStore(tmp_path / "other-store", max_bytes=1 << 30).add(str(adapter)).digest


@pytest.fixture
def host(adapter: Path) -> Iterator[AdapterHost]:
    with adapter_host() as host:
        host.put("/a", adapter)
        yield host


Make = Callable[..., AdapterStore]


@pytest.fixture
def make(tmp_path: Path, host: AdapterHost) -> Iterator[Make]:
    made: list[AdapterStore] = []

    def make(name: str = "store", **options: Any) -> AdapterStore:
        usual: dict[str, Any] = {"hosts": parse_hosts([host.url]), "timeouts": QUICK, "backoff_s": 0.01}
        made.append(AdapterStore(tmp_path / name, max_bytes=1 << 22, **(usual | options)))
        return made[-1]

    yield make
    host.go_on.set()
    for store in made:
        store.stop()


def obtain(store: AdapterStore, source: str) -> StoredAdapter:
    return asyncio.run(store.obtain(source))


def left_in(store: AdapterStore) -> list[str]:
    """What is visible, and what is half there."""
    return sorted(path.name for path in store.directory.iterdir())


# --- a web server


def test_content_has_the_same_digest_wherever_it_comes_from(make: Make, host: AdapterHost, digest: str) -> None:
    store = make()
    stored = obtain(store, f"{host.url}/a")
    assert stored.digest == digest
    assert stored.path == store.path_of(digest)
    assert (stored.path / WEIGHTS).read_bytes() == WEIGHTS_BYTES
    assert left_in(store) == [digest]


def test_only_known_files_are_asked_for(make: Make, host: AdapterHost) -> None:
    host.files["/a/evil.py"] = b"import os"
    stored = obtain(make(), f"{host.url}/a")
    assert host.count("/a/evil.py") == 0
    assert not (stored.path / "evil.py").exists()


@pytest.mark.parametrize("cuts", [[1], [100_000], [0, 1, 2, 300_000], [400_000, 50_000, 1]])
def test_a_cut_transfer_goes_on(make: Make, host: AdapterHost, digest: str, cuts: list[int]) -> None:
    host.cut_after[PATH] = list(cuts)
    assert obtain(make(), f"{host.url}/a").digest == digest
    assert host.count(PATH) == len(cuts) + 1
    # At most one byte of each try is sent twice.
    assert host.sent_bytes[PATH] <= len(WEIGHTS_BYTES) + len(cuts)


def test_a_server_without_ranges_starts_over(make: Make, host: AdapterHost, digest: str) -> None:
    host.takes_ranges = False
    host.cut_after[PATH] = [300_000]
    assert obtain(make(), f"{host.url}/a").digest == digest
    assert host.sent_bytes[PATH] == len(WEIGHTS_BYTES) + 300_000


def test_a_file_that_changes_meanwhile_is_never_mixed(make: Make, host: AdapterHost) -> None:
    changed = bytes(reversed(WEIGHTS_BYTES)) + b"more"
    host.cut_after[PATH] = [300_000]
    host.change_after_cut[PATH] = changed
    stored = obtain(make(), f"{host.url}/a")
    assert (stored.path / WEIGHTS).read_bytes() == changed


def test_without_a_version_nothing_is_joined(make: Make, host: AdapterHost) -> None:
    host.etags[PATH] = 'W/"weak"'
    changed = WEIGHTS_BYTES[::-1]
    host.cut_after[PATH] = [300_000]
    host.change_after_cut[PATH] = changed
    stored = obtain(make(), f"{host.url}/a")
    assert (stored.path / WEIGHTS).read_bytes() == changed


@pytest.mark.parametrize("statuses", [[503], [500, 502, 429], [408, 504, 503, 500]])
def test_servers_that_stumble_are_asked_again(make: Make, host: AdapterHost, digest: str, statuses: list[int]) -> None:
    host.statuses[PATH] = list(statuses)
    assert obtain(make(), f"{host.url}/a").digest == digest


def test_asking_again_has_an_end(make: Make, host: AdapterHost) -> None:
    host.statuses[PATH] = [503] * 1000
    store = make()
    with pytest.raises(Unavailable) as caught:
        obtain(store, f"{host.url}/a?sig=secret")
    assert caught.value.retry_after_s is not None and "secret" not in caught.value.message
    assert host.count(PATH) == TransferLimits(0).tries


@pytest.mark.parametrize("status", [401, 403, 400, 418])
def test_a_refusal_is_not_argued_with(make: Make, host: AdapterHost, status: int) -> None:
    host.statuses[PATH] = [status]
    with pytest.raises(AdapterInvalid, match=str(status)):
        obtain(make(), f"{host.url}/a")
    assert host.count(PATH) == 1


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_what_is_no_adapter_is_said_so(make: Make, host: AdapterHost, missing: str) -> None:
    del host.files[f"/a/{missing}"]
    store = make()
    with pytest.raises(AdapterInvalid, match=missing):
        obtain(store, f"{host.url}/a")
    assert not any(len(name) == 64 for name in left_in(store))


def test_nobody_there(make: Make) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable):
        obtain(make(hosts=parse_hosts([url])), f"{url}/a")


@pytest.mark.parametrize(("path", "claimed"), [(PATH, 1 << 40), (f"/a/{CONFIG}", 2 << 20), (f"/a/{WEIGHTS}", 5 << 20)])
def test_giants_are_refused_before_they_are_read(make: Make, host: AdapterHost, path: str, claimed: int) -> None:
    host.lengths[path] = claimed
    store = make()
    with pytest.raises(AdapterInvalid, match="limit"):
        obtain(store, f"{host.url}/a")


def test_giants_that_hide_their_size_are_stopped(make: Make, host: AdapterHost) -> None:
    host.files[PATH] = bytes(5 << 20)
    host.headers[PATH] = {"content-length": ""}
    with pytest.raises(AdapterInvalid, match="grew past the limit"):
        obtain(make(), f"{host.url}/a")


def test_less_than_promised_is_not_an_adapter(make: Make, host: AdapterHost) -> None:
    host.lengths[PATH] = len(WEIGHTS_BYTES) + 10
    store = make()
    with pytest.raises(Unavailable):
        obtain(store, f"{host.url}/a")
    assert not any(len(name) == 64 for name in left_in(store))


def test_a_stalled_transfer_ends_in_time(make: Make, host: AdapterHost) -> None:
    host.stalled.add(PATH)
    store = make(timeouts=Timeouts(0.2, 0.2), fetch_timeout_s=1.0)
    with pytest.raises(Unavailable):
        obtain(store, f"{host.url}/a")


def test_headers_that_drip_end_in_time(make: Make) -> None:
    """Every byte comes soon enough for a timeout, and no chunk of a body ever comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not over.is_set():
                    connection, _ = listener.accept()
                    threading.Thread(target=drip_into, args=(connection,), daemon=True).start()

        def drip_into(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                while not over.wait(0.05):
                    connection.sendall(b"y")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        store = make(hosts=parse_hosts([url]), fetch_timeout_s=0.5)

        async def body() -> None:
            with pytest.raises(Unavailable, match="within"):
                await store.obtain(f"{url}/a")

        try:
            run(body)
        finally:
            over.set()


def test_a_server_that_cuts_every_answer_does_not_use_up_descriptors(host: AdapterHost) -> None:
    web = Web(parse_hosts([host.url]), timeouts=QUICK)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        host.cut_after[PATH] = [10]
        with web.open(f"{host.url}{PATH}") as reading, pytest.raises(Transient):
            list(reading.chunks)
    assert len(os.listdir("/proc/self/fd")) <= before + CONNECTIONS
    web.close()


def test_a_pin_is_kept(make: Make, host: AdapterHost, digest: str) -> None:
    store = make()
    assert obtain(store, f"{host.url}/a#digest={digest}").digest == digest
    asked = len(host.asked)
    assert obtain(store, f"{host.url}/a#digest={digest}").digest == digest
    assert len(host.asked) == asked  # it cannot be anything else
    with pytest.raises(AdapterInvalid, match="digest"):
        obtain(store, f"{host.url}/a#digest={'0' * 64}")
    assert left_in(store) == [digest]


def test_a_pinned_directory(make: Make, adapter: Path, digest: str) -> None:
    store = make()
    with pytest.raises(AdapterInvalid, match="digest"):
        obtain(store, f"{adapter}#digest={'0' * 64}")
    assert left_in(store) == []
    assert obtain(store, f"{adapter}#digest={digest}").digest == digest


def test_kinds_that_are_off_are_refused_with_the_flag(make: Make, host: AdapterHost, adapter: Path) -> None:
    store = make(kinds=("local",))
    for source in (f"{host.url}/a", "hf://owner/repo", "s3://bucket/a", "gs://bucket/a"):
        with pytest.raises(InvalidRequest, match="--adapter-source"):
            obtain(store, source)
    assert host.asked == []
    obtain(store, str(adapter))


def test_progress_is_told(make: Make, host: AdapterHost) -> None:
    counts: list[int] = []
    asyncio.run(make().obtain(f"{host.url}/a", counts.append))
    assert sum(counts) == sum(map(len, host.files.values()))


# --- many at once


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_true():
            await asyncio.sleep(0.01)


def test_a_hundred_that_want_one_adapter_are_one_transfer(make: Make, host: AdapterHost, digest: str) -> None:
    store = make()

    async def body() -> None:
        host.stalled.add(PATH)
        waiting = [asyncio.create_task(store.ensure(digest, f"{host.url}/a")) for _ in range(100)]
        await until(lambda: host.sent_bytes[PATH] > 0)
        for task in waiting[:99]:  # who leaves does not stop it for the others
            task.cancel()
        await asyncio.sleep(0)
        assert [each.source for each in store.fetching()] == [f"{host.url}/a"]
        host.go_on.set()
        assert await waiting[99] == store.path_of(digest)

    run(body)
    assert host.count(PATH) == 1
    assert store.fetching() == []


def test_a_transfer_that_everybody_left_still_arrives(make: Make, host: AdapterHost, digest: str) -> None:
    store = make()

    async def body() -> None:
        host.stalled.add(PATH)
        only = asyncio.create_task(store.ensure(digest, f"{host.url}/a"))
        await until(lambda: host.sent_bytes[PATH] > 0)
        only.cancel()
        host.go_on.set()
        await until(lambda: store.is_ready(digest))

    run(body)
    assert host.count(PATH) == 1


def test_what_was_evicted_is_fetched_again_and_must_be_the_same(make: Make, host: AdapterHost, digest: str) -> None:
    store = make()

    async def body() -> None:
        await store.ensure(digest, f"{host.url}/a")
        (store.path_of(digest)).rename(store.directory.parent / "gone")
        assert (await store.ensure(digest, f"{host.url}/a") / WEIGHTS).read_bytes() == WEIGHTS_BYTES
        (store.path_of(digest)).rename(store.directory.parent / "gone-too")
        host.files[PATH] = b"something else"
        with pytest.raises(AdapterChanged) as caught:
            await store.ensure(digest, f"{host.url}/a")
        assert caught.value.status == 400 and "deploy" in caught.value.message
        del host.files[PATH]
        with pytest.raises(AdapterChanged):
            await store.ensure(digest, f"{host.url}/a")

    run(body)
    assert not any(len(name) == 64 for name in left_in(store))


def test_an_entry_that_lost_bytes_is_fetched_again(make: Make, host: AdapterHost, digest: str) -> None:
    obtain(make(), f"{host.url}/a")
    os.truncate(make().path_of(digest) / WEIGHTS, 10)
    after_restart = make()
    path = asyncio.run(after_restart.ensure(digest, f"{host.url}/a"))
    assert (path / WEIGHTS).read_bytes() == WEIGHTS_BYTES
    (path / WEIGHTS).write_bytes(WEIGHTS_BYTES[::-1])  # the same size
    assert after_restart.verify(digest) is False
    assert not after_restart.has(digest)


# --- two servers, and killed ones

FETCH = """
import asyncio, sys
from pathlib import Path
from serverlesslora.adapters.hosts import parse_hosts
from serverlesslora.adapters.store import AdapterStore
store = AdapterStore(Path(sys.argv[1]), max_bytes=1 << 30, hosts=parse_hosts([sys.argv[2]]))
print(asyncio.run(store.obtain(sys.argv[2] + "/a")).digest, flush=True)
"""


def fetch_elsewhere(store: Path, url: str, **options: Any) -> subprocess.Popen[str]:
    roots = os.pathsep.join(str(ROOT / each) for each in (".", "ipc"))
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, str(store), url],
        env=os.environ | {"PYTHONPATH": roots},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_killed_transfer_is_gone_on_with(make: Make, host: AdapterHost, digest: str) -> None:
    store = make()
    host.stalled.add(PATH)
    other = fetch_elsewhere(store.directory, host.url)
    try:
        partial = store.directory
        wait_until(lambda: any(f.stat().st_size > 100_000 for f in partial.glob(f".partial-*/{WEIGHTS}")), 20)
        make().sweep()  # of another server that starts now: it is not its business
        assert len(list(partial.glob(".partial-*"))) == 1
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert not any(len(name) == 64 for name in left_in(store))
    store.sweep()
    (left,) = partial.glob(".partial-*")
    have = (left / WEIGHTS).stat().st_size
    host.stalled.clear()
    host.sent_bytes.clear()
    assert obtain(store, f"{host.url}/a").digest == digest
    assert host.sent_bytes[PATH] == len(WEIGHTS_BYTES) - have + 1
    assert left_in(store) == [digest]


def test_what_was_killed_long_ago_is_swept(make: Make) -> None:
    store = make()
    for name in (".partial-abc-0", ".incoming-x", ".leaving-y"):
        (store.directory / name).mkdir()
    (store.directory / ".partial-new-0").mkdir()
    os.utime(store.directory / ".partial-abc-0", (1, 1))
    store.sweep()
    assert left_in(store) == [".partial-new-0"]


def test_two_servers_that_fetch_the_same_do_not_disturb_each_other(make: Make, host: AdapterHost, digest: str) -> None:
    store = make()
    host.stalled.add(PATH)
    other = fetch_elsewhere(store.directory, host.url)
    try:
        wait_until(lambda: host.count(PATH) == 1, 20)
        host.stalled.clear()
        assert obtain(store, f"{host.url}/a").digest == digest
        host.go_on.set()
        out, err = other.communicate(timeout=20)
    finally:
        other.kill()
        other.communicate()
    assert out.strip() == digest, err
    assert left_in(store) == [digest]


def test_a_full_disk_is_told_and_leaves_nothing(make: Make, host: AdapterHost) -> None:
    """The kernel's own refusal to write more, through a limit on the size of files."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    store = make()
    other = fetch_elsewhere(store.directory, host.url, preexec_fn=limit)
    _, err = other.communicate(timeout=20)
    assert "StorageFull" in err and "Traceback" in err
    assert left_in(store) == []


def test_the_quota_is_looked_at_before_anything_is_fetched(make: Make, host: AdapterHost, adapter: Path) -> None:
    host.put(f"/owner/repo/resolve/{COMMIT}/sub", adapter)
    store = make(quota_bytes=100_000, make_remote=lambda *_: site_with_sizes(host))
    with pytest.raises(StorageFull, match="adapter-store-mb"):
        obtain(store, f"{host.url}/a")
    assert host.asked == []
    assert left_in(store) == []


def site_with_sizes(host: AdapterHost) -> Remote:
    site = Site(WebSource(f"{host.url}/a/"), parse_hosts([host.url]), QUICK)
    known = [file for file in site.files() if f"/a/{file.name}" in host.files]
    sized = [type(file)(file.name, len(host.files[f"/a/{file.name}"])) for file in known]
    site.files = lambda: sized  # type: ignore[method-assign]
    return site


def test_the_least_recently_used_leaves(make: Make, host: AdapterHost, tmp_path: Path) -> None:
    urls = []
    for number in range(4):
        host.put(f"/{number}", make_adapter(tmp_path / str(number), bytes([number]) * 300_000))
        urls.append(f"{host.url}/{number}")
    needed = Needed()
    store = make(quota_bytes=1_000_000, needed=lambda: needed)
    digests = [obtain(store, url).digest for url in urls[:3]]
    for age, digest in enumerate((digests[1], digests[2], digests[0])):
        os.utime(store.path_of(digest), (1000 + age, 1000 + age))
    needed = Needed(in_use=frozenset({digests[1]}))  # the oldest, but it lies in a worker
    with store.hold(digests[2]):  # the next, but somebody is about to load it
        digests.append(obtain(store, urls[3]).digest)
    assert [store.has(digest) for digest in digests] == [False, True, True, True]
    needed = Needed(in_use=frozenset(digests))
    with pytest.raises(StorageFull):
        obtain(store, urls[0])
    assert [store.has(digest) for digest in digests] == [False, True, True, True]


# --- a hub


@pytest.fixture
def hub(host: AdapterHost, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterHost:
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    host.put(f"/owner/repo/resolve/{COMMIT}/sub", adapter)
    return host


def test_a_repository_of_a_hub(make: Make, hub: AdapterHost, digest: str) -> None:
    hub.cut_after[HUB_PATH] = [300_000]
    store = make(hosts=HostRules())  # the hub itself is the operator's choice
    assert obtain(store, "hf://owner/repo@v1/sub").digest == digest
    assert any(asked.startswith("/api/models/owner/repo/revision/v1") for asked, _ in hub.asked)
    assert hub.sent_bytes[HUB_PATH] == len(WEIGHTS_BYTES) + 1
    assert hub.received[-1]["authorization"] == "Bearer hf_secret"


def test_what_a_hub_hashes_must_be_what_arrives(make: Make, hub: AdapterHost) -> None:
    hub.hub_sha256[HUB_PATH] = "0" * 64
    store = make(hosts=HostRules())
    with pytest.raises(AdapterInvalid, match="sha256"):
        obtain(store, "hf://owner/repo/sub")
    assert not any(len(name) == 64 for name in left_in(store))


def test_a_repository_that_is_not_there(make: Make, hub: AdapterHost) -> None:
    hub.statuses["/api/models/owner/none"] = [404]
    with pytest.raises((NotFound, AdapterInvalid)):
        obtain(make(hosts=HostRules()), "hf://owner/none")
    with pytest.raises(AdapterInvalid, match=CONFIG):
        obtain(make(hosts=HostRules()), "hf://owner/repo/elsewhere")


def test_a_hub_leads_nobody_inside(make: Make, hub: AdapterHost) -> None:
    with adapter_host() as inside:
        inside.files["/secret"] = WEIGHTS_BYTES
        hub.redirects[HUB_PATH] = f"{inside.url}/secret"
        with pytest.raises(AdapterInvalid):
            obtain(make(hosts=HostRules()), "hf://owner/repo/sub")
        assert inside.asked == []


def test_offline_the_hub_s_cache_is_all_there_is(
    make: Make, hub: AdapterHost, adapter: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    store = make(hosts=HostRules())
    with pytest.raises(NotFound, match="HF_HUB_OFFLINE"):
        obtain(store, "hf://owner/repo/sub")
    repo = tmp_path / "cache" / "models--owner--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT / "sub"
    snapshot.mkdir(parents=True)
    for path in adapter.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert obtain(store, "hf://owner/repo/sub").digest == digest
    assert hub.asked == []


# --- buckets


@pytest.fixture
def bucket(host: AdapterHost, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterHost:
    for name, value in {
        "AWS_ENDPOINT_URL": host.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    host.put("/adapters/team/legal", adapter)
    return host


def test_a_bucket_that_cannot_be_reached_may_be_later(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable):
        obtain(make(), "s3://adapters/team/legal")


def test_a_bucket(make: Make, bucket: AdapterHost, digest: str) -> None:
    assert obtain(make(), "s3://adapters/team/legal").digest == digest
    # Nothing was listed that may be long: only what a file that is not there could be the folder of.
    assert not any("prefix=team%2Flegal%2F&" in f"{asked}&" for asked, _ in bucket.asked)
    with pytest.raises(NotFound):
        obtain(make(), "s3://adapters/team/none")
    del bucket.files[f"/adapters/team/legal/{CONFIG}"]
    with pytest.raises(AdapterInvalid, match=CONFIG):
        obtain(make("another"), "s3://adapters/team/legal")


class Altered:
    """A file system of which one file's bytes are not those that its checksum is of."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        content: bytes = self._fs.cat_file(path, start=start, end=end)
        return content[::-1] if path.endswith(WEIGHTS) else content


def test_a_bucket_s_checksums_are_compared(make: Make, bucket: AdapterHost) -> None:
    from serverlesslora.adapters.places import _file_system

    def altered(source: Source, rules: HostRules, timeouts: Timeouts) -> Remote:
        assert isinstance(source, BucketSource)
        return Bucket(source, timeouts, Altered(_file_system("s3", timeouts)))

    with pytest.raises(AdapterInvalid, match="md5"):
        obtain(make(make_remote=altered), "s3://adapters/team/legal")


def test_the_missing_package_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'serverlesslora\[gcs\]'"):
        obtain(make(), "gs://adapters/team/legal")


def test_any_object_store_that_fsspec_knows(make: Make, adapter: Path, digest: str) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    for path in adapter.iterdir():
        fs.pipe_file(f"/box/legal/{path.name}", path.read_bytes())

    def in_memory(source: Source, rules: HostRules, timeouts: Timeouts) -> Remote:
        assert isinstance(source, BucketSource)
        return Bucket(source, timeouts, fs)

    assert obtain(make(make_remote=in_memory), "gs://box/legal").digest == digest


def test_a_stopped_transfer_leaves_its_part(tmp_path: Path, host: AdapterHost) -> None:
    host.stalled.add(PATH)
    stop = threading.Event()
    site = Site(WebSource(f"{host.url}/a/"), parse_hosts([host.url]), QUICK)
    into = tmp_path / "into"
    into.mkdir()
    transfer = Transfer(site, into, TransferLimits(1 << 30, backoff_s=0.01), stop=stop)
    failures: list[BaseException] = []

    def body() -> None:
        try:
            transfer.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    wait_until(lambda: host.sent_bytes[PATH] > 0)
    stop.set()
    site.close()
    thread.join(10)
    assert not thread.is_alive() and [type(error).__name__ for error in failures] == ["Stopped"]
