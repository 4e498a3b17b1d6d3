"""Workers as real processes where backbones are not shared, or nothing is preloaded: what each has for itself, what is
there before and after, and that nobody outlives the gateway."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from serverlesslora.backbone.private import make_private
from serverlesslora.config import BackboneConfig
from serverlesslora.devices import DeviceKind
from serverlesslora.errors import ConfigError, Unavailable
from serverlesslora.gateway.backbone_service import BackboneService
from serverlesslora.gateway.worker_link import Stream, WorkerLink
from serverlesslora.scheduler.settings import PreloadSetting, Switch
from serverlesslora.worker.lease import DeviceLease, create_lease_fd
from serverlesslora_ipc import sealed
from serverlesslora_ipc.messages import Delta, Finished, Generate, Ready, SamplingParams, TokensPrompt, WorkerLimits
from tests.fakes import byte_tokenizer, tiny_model
from tests.server import wait_until

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 200.0
LIMITS = WorkerLimits(threads=2, kv_bytes=1 << 20)
PROMPT = (3, 1, 4, 1, 5)
NUM_TOKENS = 6
WEIGHTS = "/memfd:slora-weights"


class Checkpoint(NamedTuple):
    path: Path
    size_bytes: int
    answer: tuple[int, ...]  # to PROMPT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of a size that nothing else in a worker could be mistaken for."""
    path = tmp_path_factory.mktemp("backbone")
    model = tiny_model(hidden_size=256, intermediate_size=2048, num_hidden_layers=8)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    size_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert size_bytes > 50_000_000
    return Checkpoint(path, size_bytes, tuple(ids[len(PROMPT) :]))


def make_service(
    model: Path, state_dir: Path, *, sharing: Switch, preload: PreloadSetting, lease_fd: int, warm_pool: int = 0
) -> BackboneService:
    return BackboneService(
        "base",
        BackboneConfig(str(model), name="base"),
        dtype="float32",
        device="cpu",
        limits=LIMITS,
        lease_fd=lease_fd,
        adapter_bytes=1 << 20,
        state_dir=str(state_dir),
        warm_pool=warm_pool,
        sharing=sharing,
        preload=preload,
    )


class Bench:
    """A service with its workers listened to."""

    def __init__(self, service: BackboneService) -> None:
        self.service = service
        self._pumps: set[asyncio.Task[None]] = set()

    def fork(self, *, may_be_spare: bool = True) -> WorkerLink:
        link = self.service.fork("d", may_be_spare=may_be_spare)
        pump = asyncio.create_task(link.main_loop(lambda gone: None))
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)
        return link

    async def start(self, *, may_be_spare: bool = True) -> tuple[WorkerLink, Ready]:
        link = self.fork(may_be_spare=may_be_spare)
        return link, await asyncio.shield(link.ready)

    async def leave(self) -> None:
        """Every worker, until its process is gone."""
        while self.service.pids:
            await asyncio.sleep(0.01)

    async def shutdown(self) -> None:
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await self.service.shutdown()


async def answer(link: WorkerLink) -> tuple[int, ...]:
    stream = Stream()
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    link.submit(Generate("r", None, TokensPrompt(PROMPT), sampling), stream)
    tokens: list[int] = []
    while not isinstance(event := await stream.next(), Finished):
        if isinstance(event, Delta):
            tokens += event.token_ids
    return tuple(tokens)


@asynccontextmanager
async def bench(model: Path, state_dir: Path, **settings: Any) -> AsyncIterator[Bench]:
    lease_fd = create_lease_fd()
    running = Bench(make_service(model, state_dir, lease_fd=lease_fd, **settings))
    running.service.startup()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield running
    finally:
        await running.shutdown()
        os.close(lease_fd)


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scene())


def maps(pid: int, name: str | Path) -> bool:
    return str(name) in Path(f"/proc/{pid}/maps").read_text()


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def anonymous_bytes(pid: int) -> int:
    """Of the largest private mapping without a name: a copy of the weights is one."""
    found = [0]
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            is_anonymous = len(rest) < 5
        elif first == "Private_Dirty:" and is_anonymous:
            found.append(int(rest[0]) << 10)
    return max(found)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def check_is_private(pid: int, size_bytes: int) -> None:
    assert not maps(pid, WEIGHTS), "the shared pages are still mapped"
    assert private_bytes(pid) >= size_bytes
    assert anonymous_bytes(pid) >= size_bytes


# --- the copy itself


@pytest.mark.parametrize("size", [1, 4096, (64 << 20) + 12345])
def test_a_copy_takes_the_place_of_the_shared_memory(size: int) -> None:
    with sealed.Draft("slora-weights", size) as draft:
        draft.map[0] = 7
        draft.map[size - 1] = 9
        fd = draft.seal()
    shared = sealed.map_readonly(fd, size)
    turns = itertools.count()
    made_before = memoryview(shared)

    class Lease(DeviceLease):
        def turn(self) -> Any:
            next(turns)
            return super().turn()

    make_private(shared, fd, threads=2, cores=(), turn=Lease(None).turn)
    maps = Path("/proc/self/maps").read_text()
    assert WEIGHTS not in maps
    assert made_before[0] in (7, 9)
    assert made_before[size - 1] == 9
    assert next(turns) == -(-size // (64 << 20)), "a turn is one slice per thread"
    # Not writable either: Python would refuse it anyway, the kernel is asked.
    start = address_of(made_before)
    (line,) = [each for each in maps.splitlines() if int(each.split("-")[0], 16) <= start < end_of(each)]
    assert line.split()[1] == "r--p"
    made_before.release()
    shared.close()
    os.close(fd)


def address_of(view: memoryview) -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def end_of(line: str) -> int:
    return int(line.split()[0].split("-")[1], 16)


def test_a_copy_of_less_than_the_mapping_is_an_error() -> None:
    shared = mmap.mmap(-1, 8192)
    fd = os.memfd_create("short")
    os.ftruncate(fd, 4096)
    with pytest.raises(OSError, match="ends at 4096 bytes, expected 8192"):
        make_private(shared, fd, threads=1, cores=(), turn=DeviceLease(None).turn)
    os.close(fd)


# --- sharing=off, preload=on


def test_forked_workers_and_spares_have_copies_of_their_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def scene() -> None:
        async with bench(checkpoint.path, tmp_path, sharing="off", preload="on", warm_pool=1) as at:
            service = at.service
            await service.wait_ready()
            first, ready = await at.start(may_be_spare=False)
            assert ready.copy_s > 0
            assert ready.load_s == ready.libraries_s == 0
            await asyncio.to_thread(wait_until, lambda: "spare 0" in service.role_pids(), TIMEOUT_S)
            spare = service.role_pids()["spare 0"]
            # It copies before it has a domain.
            await asyncio.to_thread(wait_until, lambda: anonymous_bytes(spare) >= checkpoint.size_bytes, TIMEOUT_S)
            check_is_private(spare, checkpoint.size_bytes)
            second, ready = await at.start()
            assert ready.pid == spare
            assert ready.copy_s == 0, "it was copied before anybody asked"
            for link in (first, second):
                assert link.pid is not None
                assert service.role_pids()[link.worker_id] == link.pid
                assert await answer(link) == checkpoint.answer
                check_is_private(link.pid, checkpoint.size_bytes)
            assert "every worker copies it" in service.status().sharing
            assert service.size_bytes == service.facts.copy_bytes >= checkpoint.size_bytes, "the host still holds it"
            facts = service.facts
            assert min(facts.libraries_s, facts.load_s, facts.prepare_s, facts.copy_s) > 0

    play(scene)


# --- preload=off


def test_with_preload_off_everything_comes_and_goes_with_its_use(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def scene() -> None:
        async with bench(checkpoint.path, tmp_path, sharing="on", preload="off", warm_pool=3) as at:
            service = at.service
            assert service.role_pids() == {}
            assert (service.status().state, service.context_length, service.size_bytes) == ("resting", None, 0)
            assert service.takes_requests
            assert not service.rest(), "there is nothing to give back"
            for _ in range(2):
                link = at.fork()  # nobody has waited for the backbone: it is loaded for this
                assert not service.rest(), "a start is under way"
                ready = await asyncio.shield(link.ready)
                assert ready.libraries_s > 0
                assert ready.load_s == ready.copy_s == 0
                assert service.role_pids().keys() == {"host", link.worker_id}
                assert parent(ready.pid) == os.getpid()
                assert maps(ready.pid, WEIGHTS)
                assert await answer(link) == checkpoint.answer
                assert not service.rest(), "a worker runs"
                host = os.pidfd_open(service.role_pids()["host"])
                link.retire()
                await at.leave()
                assert not service.rest(unused_for_s=1e6)
                assert service.rest()
                assert await asyncio.to_thread(select.select, [host], [], [], TIMEOUT_S) == ([host], [], [])
                os.close(host)
                assert (service.status().state, service.size_bytes, service.context_length) == ("resting", 0, 256)
                assert service.facts.copy_bytes >= checkpoint.size_bytes
            while service.role_pids():
                await asyncio.sleep(0.01)

    play(scene)


def test_with_both_off_a_function_is_a_process_that_loads_its_own_backbone(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async def scene() -> None:
        async with bench(checkpoint.path, tmp_path, sharing="off", preload="off") as at:
            service = at.service
            await service.wait_ready()
            assert service.role_pids() == {}
            link, ready = await at.start()
            assert ready.libraries_s > 0
            assert ready.load_s > 0
            assert ready.copy_s == 0
            assert service.role_pids() == {link.worker_id: ready.pid}
            check_is_private(ready.pid, checkpoint.size_bytes)
            assert not maps(ready.pid, checkpoint.path), "its files are still mapped"
            assert await answer(link) == checkpoint.answer
            assert (service.size_bytes, service.context_length) == (0, 256)
            assert service.facts.copy_bytes >= checkpoint.size_bytes
            assert service.facts.load_s == ready.load_s
            assert "loads a copy of its own" in service.status().sharing
            assert not service.rest()
            link.kill()
            await at.leave()
            assert service.role_pids() == {}

    play(scene)


def test_a_process_that_cannot_load_its_backbone_says_why(tmp_path: Path) -> None:
    async def scene() -> None:
        async with bench(tmp_path / "nowhere", tmp_path, sharing="off", preload="off") as at:
            with pytest.raises(Unavailable, match=r"cannot be served: there is no directory .*nowhere"):
                await at.start()
            await at.leave()

    play(scene)


# --- who outlives whom

MIDDLE = """
import asyncio, sys
from pathlib import Path
from tests.test_private_workers import bench

async def main():
    model, scratch = map(Path, sys.argv[1:])
    async with (
        bench(model, scratch, sharing="off", preload="on", warm_pool=1) as copies,
        bench(model, scratch, sharing="on", preload="off") as fresh,
        bench(model, scratch, sharing="off", preload="off") as alone,
    ):
        await copies.service.wait_ready()
        for each in (copies, fresh, alone):
            await each.start(may_be_spare=False)
        while "spare 0" not in copies.service.role_pids():
            await asyncio.sleep(0.01)
        alone.fork()  # it has not begun to be a worker
        pids = [pid for each in (copies, fresh, alone) for pid in each.service.role_pids().values()]
        print(*pids, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


def test_everybody_dies_with_a_killed_gateway(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = sorted(os.listdir("/dev/shm"))
    roots = os.pathsep.join([str(ROOT), *sys.path])
    middle = subprocess.Popen(
        [sys.executable, "-c", MIDDLE, str(checkpoint.path), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": roots},
    )
    with middle:
        assert middle.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in middle.stdout.readline().split()]
        assert len(pidfds) == 3 + 1 + 2 + 1 + 1, "host, launcher, spare, worker; host, worker; worker; one that starts"
        middle.kill()
    for pidfd in pidfds:
        ready, _, _ = select.select([pidfd], [], [], TIMEOUT_S)
        os.close(pidfd)
        assert ready, "a process lives on"
    assert sorted(os.listdir("/dev/shm")) == before


# --- what is refused


@pytest.mark.parametrize("device", ["cuda", "emulated"])
@pytest.mark.parametrize("switch", ["sharing", "preload"])
def test_devices_share_and_preload(tmp_path: Path, device: DeviceKind, switch: str) -> None:
    with pytest.raises(ConfigError, match=f"{switch}=off is for the cpu device"):
        BackboneService(
            "base",
            BackboneConfig("base"),
            dtype="float32",
            device=device,
            limits=LIMITS,
            lease_fd=-1,
            adapter_bytes=1,
            state_dir=str(tmp_path),
            warm_pool=0,
            **{switch: "off"},  # type: ignore[arg-type]
        )
