"""The adapter store: identity by content, and nothing but regular files gets in."""

import asyncio
import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.adapters.entries import SIZES as SIZES_FILE
from serverlesslora.adapters.entries import Entries
from serverlesslora.adapters.files import CONFIG, WEIGHTS, identify
from serverlesslora.adapters.quota import Entry, Needed, to_evict
from serverlesslora.adapters.store import AdapterStore
from serverlesslora.errors import AdapterChanged, AdapterInvalid, NotFound, StorageFull, Unavailable


def make_adapter(path: Path, *, weights: bytes = b"weights", **config: object) -> Path:
    path.mkdir(parents=True)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    (path / WEIGHTS).write_bytes(weights)
    return path


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store", max_bytes=1 << 20)


def test_identity_is_content_not_path_or_spelling(store: AdapterStore, tmp_path: Path) -> None:
    first = store.add(str(make_adapter(tmp_path / "a", base_model_name_or_path="x")))
    again = store.add(str(make_adapter(tmp_path / "b", base_model_name_or_path="y")))
    assert first == again
    assert store.add(str(make_adapter(tmp_path / "c", weights=b"other"))).digest != first.digest
    assert store.add(str(make_adapter(tmp_path / "d", r=8))).digest != first.digest


def test_a_chat_template_is_part_of_the_identity(store: AdapterStore, tmp_path: Path) -> None:
    plain = store.add(str(make_adapter(tmp_path / "a")))
    source = make_adapter(tmp_path / "b")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert store.add(str(source)).digest != plain.digest


def test_the_copy_outlives_the_source(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a", weights=b"abc")
    stored = store.add(str(source))
    (source / WEIGHTS).write_bytes(b"")
    assert (stored.path / WEIGHTS).read_bytes() == b"abc"


@pytest.mark.parametrize("kind", ["link", "fifo", "device", "directory"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_only_regular_files(store: AdapterStore, tmp_path: Path, kind: str, name: str) -> None:
    source = make_adapter(tmp_path / "a")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (source / name).unlink()
    match kind:
        case "link":
            (source / name).symlink_to(secret)
        case "fifo":
            os.mkfifo(source / name)
        case "device":
            (source / name).symlink_to("/dev/zero")
        case "directory":
            (source / name).mkdir()
    with pytest.raises(AdapterInvalid):
        store.add(str(source))
    assert list(store.directory.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{bad", "null", "[" * 100_000])
def test_bad_config_is_refused(store: AdapterStore, tmp_path: Path, text: str) -> None:
    source = make_adapter(tmp_path / "a")
    (source / CONFIG).write_text(text)
    with pytest.raises(AdapterInvalid, match=CONFIG):
        store.add(str(source))


@pytest.fixture
def no_descriptors() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """The kernel refuses to open anything, as it does to a server with too many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    @contextlib.contextmanager
    def none_left(but: int = 0) -> Iterator[None]:
        os.close(lowest := os.open("/dev/null", os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + but, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return none_left


def test_without_descriptors_nothing_is_called_damaged(
    store: AdapterStore, tmp_path: Path, no_descriptors: Callable[..., contextlib.AbstractContextManager[None]]
) -> None:
    source = make_adapter(tmp_path / "a")
    stored = store.add(str(source))
    for without_sizes in (False, True):
        if without_sizes:
            (stored.path / SIZES_FILE).unlink()
        after_restart = AdapterStore(store.directory, max_bytes=1 << 20)

        async def body(store: AdapterStore = after_restart) -> None:
            with no_descriptors():
                with pytest.raises(Unavailable):
                    await store.ensure(stored.digest, "/gone")
                with pytest.raises(Unavailable):
                    store.add(str(source))

        asyncio.run(body())
        assert after_restart.has(stored.digest)


def test_without_descriptors_no_place_to_work_is_looked_for_for_ever(
    store: AdapterStore, no_descriptors: Callable[..., contextlib.AbstractContextManager[None]]
) -> None:
    entries = Entries(store.directory)
    with no_descriptors(1), pytest.raises(OSError), entries.partial("key"):  # the one is for the lock on the store
        pass
    assert len(list(store.directory.iterdir())) == 1


def test_illegible_sizes_are_no_damage(store: AdapterStore, tmp_path: Path) -> None:
    """What a power cut may leave of a file that nobody synced."""
    stored = store.add(str(make_adapter(tmp_path / "a")))
    (stored.path / SIZES_FILE).write_bytes(b"")
    after_restart = AdapterStore(store.directory, max_bytes=1 << 20)
    assert asyncio.run(after_restart.ensure(stored.digest, "/gone")) == stored.path


def test_what_is_here_already_is_not_written_again(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    stored = store.add(str(source))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert store.add(str(source)) == stored
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_directory_is_not_listed(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold a million files."""

    def listed(*arguments: object) -> NoReturn:
        raise AssertionError("listed")

    source = make_adapter(tmp_path / "a")
    monkeypatch.setattr(os, "listdir", listed)
    monkeypatch.setattr(os, "scandir", listed)
    assert identify(source, max_bytes=1 << 20).size_bytes == len(b"weights")


def test_a_path_that_is_swapped_after_the_look_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tmp_path / "other" / "a")
    inside = make_adapter(tmp_path / "root" / "a")
    store = AdapterStore(tmp_path / "store", max_bytes=1 << 20, roots=[tmp_path / "root"])
    confined = AdapterStore._confined

    def looked_at_and_swapped(store: AdapterStore, text: str) -> Path:
        path = confined(store, text)
        inside.rename(tmp_path / "moved")
        inside.symlink_to(tmp_path / "other" / "a")
        return path

    monkeypatch.setattr(AdapterStore, "_confined", looked_at_and_swapped)
    with pytest.raises(NotFound):
        store.add(str(inside))
    assert list(store.directory.iterdir()) == []


def test_pickles_are_named_as_the_reason(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(AdapterInvalid, match="pickle"):
        store.add(str(source))


def test_sparse_giants_are_refused_before_reading(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    os.truncate(source / WEIGHTS, 1 << 40)
    with pytest.raises(AdapterInvalid, match="limit"):
        store.add(str(source))


def test_roots_confine(tmp_path: Path) -> None:
    inside = make_adapter(tmp_path / "root" / "a")
    outside = make_adapter(tmp_path / "other" / "a")
    (tmp_path / "root" / "link").symlink_to(outside)
    store = AdapterStore(tmp_path / "store", max_bytes=1 << 20, roots=[tmp_path / "root"])
    store.add(str(inside))
    for path in (outside, tmp_path / "root" / ".." / "other" / "a", tmp_path / "root" / "link"):
        with pytest.raises(NotFound):
            store.add(str(path))


@pytest.mark.parametrize("path", ["~nosuchuser/x", "/" + "x" * 5000, "loop", "a\0b"])
def test_odd_paths_are_not_found(store: AdapterStore, tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((NotFound, AdapterInvalid)):
        store.add(str(tmp_path / path) if path == "loop" else path)


def test_sweep_drops_half_copies(store: AdapterStore) -> None:
    (store.directory / ".incoming-x").mkdir()
    store.sweep()
    assert list(store.directory.iterdir()) == []


def test_a_copy_under_way_is_not_swept(store: AdapterStore) -> None:
    """Another server that starts meanwhile sweeps the same directory."""
    other = AdapterStore(store.directory, max_bytes=1)
    with Entries(store.directory).incoming() as incoming:
        (incoming / CONFIG).write_text("{}")
        other.sweep()
        assert (incoming / CONFIG).exists()
    assert list(store.directory.iterdir()) == []


def test_a_directory_is_copied_again_if_it_still_holds_the_same(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")

    async def body() -> None:
        stored = await store.obtain(str(source))
        stored.path.rename(tmp_path / "gone")
        assert await store.ensure(stored.digest, str(source)) == stored.path
        stored.path.rename(tmp_path / "gone-too")
        (source / WEIGHTS).write_bytes(b"other")
        with pytest.raises(AdapterChanged):
            await store.ensure(stored.digest, str(source))

    asyncio.run(body())
    assert list(store.directory.iterdir()) == []


def test_a_deploy_of_new_weights_never_joins_a_copy_that_began_before(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a", weights=b"old")

    async def body() -> None:
        first = asyncio.create_task(store.obtain(str(source)))
        await asyncio.sleep(0)
        (source / WEIGHTS).write_bytes(b"new")
        assert ((await store.obtain(str(source))).path / WEIGHTS).read_bytes() == b"new"
        await first

    asyncio.run(body())


def test_the_quota_counts_directories_too(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", max_bytes=1 << 20, quota_bytes=3000)
    first = store.add(str(make_adapter(tmp_path / "a", weights=b"a" * 2000)))
    second = store.add(str(make_adapter(tmp_path / "b", weights=b"b" * 2000)))
    assert (store.has(first.digest), store.has(second.digest)) == (False, True)
    with store.hold(second.digest), pytest.raises(StorageFull):
        store.add(str(make_adapter(tmp_path / "c", weights=b"c" * 2000)))
    assert [path.name for path in store.directory.iterdir()] == [second.digest]


DIGESTS = "abcdefgh"
SIZES = MappingProxyType({digest: 10 + 7 * number for number, digest in enumerate(DIGESTS)})


@given(
    order=st.permutations(DIGESTS),
    room=st.integers(0, sum(SIZES.values())),
    in_use=st.frozensets(st.sampled_from(DIGESTS)),
    deployed=st.frozensets(st.sampled_from(DIGESTS)),
    held=st.frozensets(st.sampled_from(DIGESTS), max_size=2),
)
def test_who_leaves(
    order: list[str], room: int, in_use: frozenset[str], deployed: frozenset[str], held: frozenset[str]
) -> None:
    """Against the plain way: drop one after the other, the least recently used first, until the rest fits."""
    entries = [Entry(digest, SIZES[digest], float(time)) for time, digest in enumerate(order)]
    left = list(order)
    for group in (set(DIGESTS) - deployed, deployed):
        for digest in order:
            if digest in group and digest not in in_use | held and sum(SIZES[each] for each in left) > room:
                left.remove(digest)
    leaving = to_evict(entries, room_bytes=room, needed=Needed(in_use, deployed), held=held)
    if sum(SIZES[each] for each in left) > room:
        assert leaving is None
    else:
        assert leaving is not None and set(order) - set(leaving) == set(left)
