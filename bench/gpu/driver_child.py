"""What a child of the driver section can do, one verb each; torch is imported only by verbs that run a kernel."""

from __future__ import annotations

import ctypes
import random
import socket
import sys
import time
from contextlib import ExitStack
from typing import Any

import xxhash

from bench.gpu.children import serve
from serverlesslora_ipc.cuda.driver import Driver, DriverError, OutOfDeviceMemory, open_driver, round_up
from serverlesslora_ipc.cuda.elastic import ElasticRange
from serverlesslora_ipc.cuda.region import DeviceRegion, Publication, RegionDraft, attach

Fds = list[int]
PATTERN = 0x5EC4E75A17C0DE01  # unlikely in memory that nobody has written
SEARCH_WORDS = 64 << 20
SEARCH_RESERVE = 1 << 30  # left to torch and to the driver


class Verbs:
    """Fds come in, `out` takes those that go back with the answer."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._driver: Driver = open_driver("cuda" if kind == "cuda" else "emulated")
        self._region: DeviceRegion | None = None
        self._publication: Publication | None = None
        self._kept: list[Any] = []

    def start(self, fds: Fds, out: Fds) -> None:
        self._driver.start()

    def torch(self, fds: Fds, out: Fds) -> int:
        """As a worker has it before it does anything: the context, torch, one kernel and one matrix product."""
        import torch

        device = torch.device("cuda", 0) if self._kind == "cuda" else torch.device("cpu")
        x = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
        self._kept.append(x @ x)
        if self._kind == "cuda":
            torch.cuda.synchronize()
            return int(torch.cuda.memory_reserved())
        return 0

    def publish(self, fds: Fds, out: Fds, size: int, seed: int) -> dict[str, Any]:
        """A region of random bytes; its descriptor goes out."""
        with RegionDraft(self._driver, size) as draft:
            fill(self._driver, draft.address, size, seed)
            self._publication = draft.publish()
        if self._publication.fd is not None:
            out.append(self._publication.fd)
        return {"sharing": self._publication.sharing, "handle": self._publication.handle.hex()}

    def attach(self, fds: Fds, out: Fds, sharing: Any, size: int, handle: str = "") -> float:
        """Seconds from descriptor to mapped memory."""
        began = time.perf_counter()
        self._region = attach(self._driver, sharing, fds[0] if fds else None, bytes.fromhex(handle), size)
        return time.perf_counter() - began

    def detach(self, fds: Fds, out: Fds) -> None:
        assert self._region is not None
        self._region.close()

    def digest(self, fds: Fds, out: Fds) -> str:
        assert self._region is not None
        return digest(self._driver, self._region.address, self._region.size)

    def touch(self, fds: Fds, out: Fds) -> float:
        """Seconds until a first kernel has read a byte of every large page: mapped memory that can really be used."""
        import torch

        from serverlesslora_kernels.cuda.memory import bytes_at

        assert self._region is not None
        device = torch.device("cuda", 0) if self._kind == "cuda" else torch.device("cpu")
        began = time.perf_counter()
        bytes_at(self._region.address, self._region.size, device)[:: 2 << 20].sum().item()
        return time.perf_counter() - began

    def write(self, fds: Fds, out: Fds) -> str:
        """Writes to the mapped memory by a kernel; answers what came of it, if this process still can."""
        assert self._region is not None
        if self._kind != "cuda":
            ctypes.memset(self._region.address, 1, 1)
            return "written"
        import torch

        from serverlesslora_kernels.cuda.memory import bytes_at

        try:
            bytes_at(self._region.address, self._region.size, torch.device("cuda", 0))[:4096].fill_(1)
            torch.cuda.synchronize()
        except RuntimeError as error:
            return f"fault: {str(error).splitlines()[0]}"
        return "written"

    def compute(self, fds: Fds, out: Fds) -> str:
        """Whether this process can still use the device."""
        if self._kind != "cuda":  # it would have died
            return "sum 8"
        import torch

        try:
            return f"sum {torch.ones(8, device='cuda').sum().item():.0f}"
        except RuntimeError as error:
            return f"fault: {str(error).splitlines()[0]}"

    def churn(self, fds: Fds, out: Fds, size: int, seed: int) -> None:
        """Takes memory in every way there is, over and over, until it is killed."""
        rng, driver = random.Random(seed), self._driver
        unit = driver.granularity()
        with ElasticRange(driver, size, unit) as elastic:
            while True:
                match rng.randrange(5):
                    case 0:
                        with RegionDraft(driver, size) as draft:
                            fill(driver, draft.address, min(size, 1 << 20), seed)
                            with draft.publish() as published, attach_again(driver, published):
                                pass
                    case 1:
                        address = driver.allocate(size)
                        driver.free(address)
                    case 2:
                        with driver.pinned(1 << 20):
                            pass
                    case 3:
                        with RegionDraft(driver, size):
                            pass
                    case _:
                        chunk = rng.randrange(elastic.num_chunks)
                        (elastic.unmap_chunk if elastic.is_resident(chunk) else elastic.map_chunk)(chunk)

    def tensor_over_gaps(self, fds: Fds, out: Fds) -> str:
        """A tensor over an elastic range made before any of it has memory, as a KV pool is made."""
        import torch

        from serverlesslora_kernels.cuda.memory import bytes_at

        device = torch.device("cuda", 0) if self._kind == "cuda" else torch.device("cpu")
        unit = ElasticRange.chunk_size(self._driver, 1)
        with ElasticRange(self._driver, 4 * unit, unit) as elastic:
            values = bytes_at(elastic.address, elastic.capacity_bytes, device)
            elastic.map_chunk(2)
            chunk = values[2 * unit : 3 * unit]
            chunk.fill_(3)
            answer = f"{chunk.sum(dtype=torch.int64).item() // unit}"
            elastic.unmap_chunk(2)
        return answer

    def leave_pattern(self, fds: Fds, out: Fds, size: int) -> int:
        """Memory full of one number, which stays until this process is killed; how often a search finds it there."""
        draft = RegionDraft(self._driver, size)
        self._kept.append(draft)
        self._words(draft).fill_(PATTERN)
        return self._count(draft)

    def search_pattern(self, fds: Fds, out: Fds, limit: int, unit: int) -> dict[str, int]:
        """As much new memory as there is, and how often it holds that number. All of it goes back."""
        self.torch([], [])  # its own memory is taken first
        searched = found = 0
        with ExitStack() as taken:
            for size in (unit, unit // 16):
                size = round_up(size, self._driver.granularity())
                while searched + size <= limit and self._driver.memory().free_bytes >= size + self._reserve():
                    try:
                        draft = taken.enter_context(RegionDraft(self._driver, size))
                    except OutOfDeviceMemory:
                        break
                    found += self._count(draft)
                    searched += size
        return {"bytes": searched, "found": found}

    def _reserve(self) -> int:
        return SEARCH_RESERVE if self._kind == "cuda" else 0

    def _words(self, draft: RegionDraft) -> Any:
        import torch

        from serverlesslora_kernels.cuda.memory import bytes_at

        device = torch.device("cuda", 0) if self._kind == "cuda" else torch.device("cpu")
        return bytes_at(draft.address, draft.size, device).view(torch.int64)

    def _count(self, draft: RegionDraft) -> int:
        """In parts: a comparison takes memory, too."""
        return sum(int((part == PATTERN).sum().item()) for part in self._words(draft).split(SEARCH_WORDS))

    def allocate(self, fds: Fds, out: Fds, size: int, seed: int) -> str:
        """Ordinary memory by legacy handle."""
        address = self._driver.allocate(size)
        fill(self._driver, address, size, seed)
        return self._driver.ipc_handle(address).hex()


def attach_again(driver: Driver, published: Publication) -> DeviceRegion:
    if published.fd is None:
        raise DriverError("churn", "no descriptors here")
    return attach(driver, published.sharing, published.fd, b"", published.size)


def pattern(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def fill(driver: Driver, address: int, size: int, seed: int) -> None:
    """The first bytes random, by pinned memory."""
    with driver.pinned(size) as staging:
        staging.view[:] = pattern(size, seed)
        driver.copy_in(address, staging.address, size)
        driver.synchronize()


def digest(driver: Driver, address: int, size: int) -> str:
    with driver.pinned(size) as staging:
        driver.copy_out(staging.address, address, size)
        driver.synchronize()
        return xxhash.xxh3_128_hexdigest(staging.view)


if __name__ == "__main__":
    sys.exit(serve(socket.socket(fileno=int(sys.argv[2])), Verbs(sys.argv[1])))
