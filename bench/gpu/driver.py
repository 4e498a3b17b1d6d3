"""Device memory shared between processes: right bytes, no writes, no leaks, and what it costs."""

from __future__ import annotations

import os
import random
import statistics
import time
from typing import Any

import xxhash

from bench.gpu.children import Child, ChildDied, settled, steady
from bench.gpu.driver_child import digest, fill, pattern
from bench.gpu.record import Recorder, Skipped
from serverlesslora_ipc.cuda.driver import Driver, open_driver, round_up
from serverlesslora_ipc.cuda.elastic import ElasticRange
from serverlesslora_ipc.cuda.region import Publication, RegionDraft, attach

LEAK_TOLERANCE = 8 << 20  # what the driver itself may keep or not, counted by the device
PATTERN_BYTES = 8 << 30
ATTACH_BAR_MS = 50.0
WORKER_CONTEXT_NAME = "context_torch_mb"


def run(recorder: Recorder) -> None:
    driver = open_driver(recorder.setting.kind)
    driver.start()
    proof = Proof(recorder, driver)
    recorder.check("the driver answers", True, f"{driver.device_name()}, pages of {driver.granularity() >> 10} KiB")
    recorder.part("shared memory", proof.shared)
    recorder.part("ordinary memory by legacy handle", proof.legacy)
    recorder.part("a descriptor alone keeps the memory", proof.descriptor_alone)
    recorder.part("elastic memory", proof.elastic)
    recorder.part("killed at any moment", proof.killed, needs_s=10)
    recorder.part("scrubbed", proof.scrubbed, needs_s=12)
    recorder.part("what an idle process costs", proof.contexts, needs_s=8)
    recorder.part("attaching 16 GB", proof.attach_large, needs_s=5)
    driver.stop()


class Proof:
    def __init__(self, recorder: Recorder, driver: Driver) -> None:
        self._recorder = recorder
        self._driver = driver
        self._kind = recorder.setting.kind
        self._dry = recorder.setting.is_dry
        self._size = (1 << 20) + 12345 if self._dry else (64 << 20) + 12345  # no multiple of anything

    def shared(self) -> None:
        check, size = self._recorder.check, self._size
        expected = xxhash.xxh3_128_hexdigest(pattern(size, 1))
        with RegionDraft(self._driver, size) as draft:
            fill(self._driver, draft.address, size, 1)
            published = draft.publish()
        sharing = published.sharing
        check("workers cannot write: shared by descriptor, mapped read-only", sharing == "vmm", published.reason)
        with published, self._attached(published) as sibling, self._attached(published) as writer:
            check("two processes read what was written", sibling.ask("digest") == writer.ask("digest") == expected)
            if sharing == "vmm":
                self._fault(writer)
            check("its sibling still reads right", sibling.ask("digest") == expected)
            check("its sibling still computes", sibling.ask("compute") == "sum 8", str(sibling.ask("compute")))
            check("the owner still reads right", digest(self._driver, published.address, size) == expected)
            with self._attached(published) as late:
                check("a new process reads right after the fault", late.ask("digest") == expected)
        control = "the same write succeeds where memory is writable"
        if not self._driver.can_export_fds():
            check(control, True, "skipped: no descriptors here")
            return
        # Had the write done nothing above, this would not show it either.
        padded = round_up(size, self._driver.granularity())
        physical = self._driver.create(padded)
        try:
            fd = self._driver.export_fd(physical)
        finally:
            self._driver.release(physical)
        try:
            with attach(self._driver, "vmm-writable", fd, b"", padded) as region, self._child() as writer:
                fill(self._driver, region.address, size, 2)
                writer.ask("attach", [fd], sharing="vmm-writable", size=padded)
                outcome = writer.ask("write")
                changed = digest(self._driver, region.address, size) != xxhash.xxh3_128_hexdigest(pattern(size, 2))
                check(control, outcome == "written" and changed, outcome)
        finally:
            os.close(fd)

    def _fault(self, writer: Child) -> None:
        """On a device the context is lost, not the process: every later call in it fails. On host memory it dies."""
        check = self._recorder.check
        try:
            outcome = writer.ask("write")
        except ChildDied as death:
            check("a writing process faults", self._dry and "-11" in str(death), str(death))
            return
        check("a writing process faults", outcome.startswith("fault"), outcome)
        after = writer.ask("compute")
        check("and can do nothing more on the device", after.startswith("fault"), after)

    def legacy(self) -> None:
        size = self._size
        with self._child() as owner, self._child() as other:
            handle = owner.ask("allocate", size=size, seed=3)
            other.ask("attach", sharing="cuda-ipc", size=size, handle=handle)
            right = other.ask("digest") == xxhash.xxh3_128_hexdigest(pattern(size, 3))
            self._recorder.check("legacy handle: another process reads what was written", right)
            other.ask("detach")

    def descriptor_alone(self) -> None:
        if not self._driver.can_export_fds():
            raise Skipped("no descriptors here")
        size, before = self._size, self._steady_free()
        child = self._child()
        child.tell("publish", size=size, seed=4)
        answer, fds = child.answer()
        child.kill()
        try:
            with attach(self._driver, answer["sharing"], fds[0], b"", size) as region:
                right = digest(self._driver, region.address, size) == xxhash.xxh3_128_hexdigest(pattern(size, 4))
                self._recorder.check("memory outlives its creator by its descriptor", right)
        finally:
            child.close()
            for fd in fds:
                os.close(fd)
        self._no_leak("nothing is left of it once the descriptor is closed", before)

    def elastic(self) -> None:
        driver, check = self._driver, self._recorder.check
        chunk = ElasticRange.chunk_size(driver, 1 if self._dry else 32 << 20)
        before = self._steady_free()
        with ElasticRange(driver, 8 * chunk, chunk) as elastic:
            seconds: list[float] = []
            for index in (5, 2, 7):
                began = time.perf_counter()
                elastic.map_chunk(index)
                seconds.append(time.perf_counter() - began)
                fill(driver, elastic.chunk_address(index), 4096, index)
            taken = before - self._free()
            check("mapped chunks take memory", abs(taken - 3 * chunk) <= LEAK_TOLERANCE, f"{taken} of {3 * chunk}")
            elastic.unmap_chunk(2)
            back = settled(self._free, before - 2 * chunk, chunk / 2)
            check("an unmapped chunk's memory is the device's again", abs(before - 2 * chunk - back) <= chunk / 2)
            wanted = [xxhash.xxh3_128_hexdigest(pattern(4096, index)) for index in (5, 7)]
            found = [digest(driver, elastic.chunk_address(index), 4096) for index in (5, 7)]
            check("the others keep their bytes and addresses", wanted == found)
            self._recorder.number("map a 32 MiB chunk", statistics.median(seconds) * 1e6, "us")
        self._no_leak("closing returns everything", before)
        with self._child() as child:
            answer = child.ask("tensor_over_gaps")
            check("a tensor over addresses without memory works once there is some", answer == "3", answer)

    def killed(self) -> None:
        before, rng = self._steady_free(), random.Random(0)
        rounds = 6 if self._dry else 8
        for seed in range(rounds):
            # Every other one may still be on its way to a context, or have none yet.
            child, longest = (Child(self._kind), 1.5) if seed % 2 else (self._child(), 0.2)
            if seed % 2:
                child.tell("start")
            child.tell("churn", size=4 * self._driver.granularity(), seed=seed)
            time.sleep(rng.uniform(0.0, longest))  # the moment is the point
            child.kill()
            child.close()
        self._no_leak(f"{rounds} processes killed at random moments", before)

    def scrubbed(self) -> None:
        """What one process leaves in memory must not be there for whoever gets that memory next."""
        size = PATTERN_BYTES if not self._dry else 4 * self._driver.granularity()
        before = self._steady_free()
        writer = self._child()
        try:
            found = writer.ask("leave_pattern", size=size)
        finally:
            writer.kill()
            writer.close()
        # Else nothing found below would say nothing.
        self._recorder.check("scrubbed: a search finds the pattern where it is", found == size // 8, f"{found} words")
        settled(self._free, before, LEAK_TOLERANCE)
        free = self._steady_free()
        limit = free if not self._dry else 8 * size
        with self._child() as reader:
            answer = reader.ask("search_pattern", timeout_s=45, limit=limit, unit=size // 8)
        searched, found = answer["bytes"], answer["found"]
        detail = f"{found} of {size // 8} words found in {searched / 1e9:.1f} of {free / 1e9:.1f} GB that were free"
        # So much of what is free that at least half of the pattern's memory must have been among it.
        enough = self._dry or searched >= free - size // 2
        self._recorder.check("scrubbed: enough memory was searched", enough, detail)
        self._recorder.check("scrubbed: nothing of a killed process is found in new memory", found == 0, detail)
        self._no_leak("and closing the search returns everything", before)

    def contexts(self) -> None:
        if self._dry:
            raise Skipped("there are no contexts on host memory")
        before = self._steady_free()
        with self._child() as one:
            bare = before - self._free()
            reserved = one.ask("torch")
            with_torch = before - self._free()
            with self._child() as two:
                two.ask("torch")
                second = before - with_torch - self._free()
        self._recorder.number("context of a bare process", bare / 1e6, "MB")
        self._recorder.number("context with torch, a kernel and a product", with_torch / 1e6, "MB")
        self._recorder.number(WORKER_CONTEXT_NAME, second / 1e6, "MB")
        self._recorder.number("of which torch's allocator holds", reserved / 1e6, "MB")
        self._no_leak("contexts go with their processes", before)

    def attach_large(self) -> None:
        size = self._size if self._dry else 16 * 10**9
        before = self._steady_free()
        with RegionDraft(self._driver, size) as draft:
            published = draft.publish()
        with published, self._child() as child:
            child.ask("torch")
            fds = [published.fd] if published.fd is not None else []
            arguments: dict[str, Any] = {"sharing": published.sharing, "size": size, "handle": published.handle.hex()}
            seconds = []
            for _ in range(3):
                seconds.append(child.ask("attach", fds, **arguments))
                first_use = child.ask("touch")
                child.ask("detach")
            self._recorder.number(
                "attach 16 GB: descriptor to mapped memory", statistics.median(seconds) * 1e3, "ms", bar=ATTACH_BAR_MS
            )
            self._recorder.number("first kernel over all of it", first_use * 1e3, "ms")
        self._no_leak("closing returns everything", before)

    def _child(self) -> Child:
        child = Child(self._kind)
        child.ask("start")
        return child

    def _attached(self, published: Publication) -> Child:
        child = self._child()
        fds = [published.fd] if published.fd is not None else []
        child.ask("attach", fds, sharing=published.sharing, size=published.size, handle=published.handle.hex())
        return child

    def _free(self) -> int:
        return self._driver.memory().free_bytes

    def _steady_free(self) -> int:
        """Before anything is counted, what ended children held has come back."""
        return self._free() if self._dry else steady(self._free)

    def _no_leak(self, name: str, before: int) -> None:
        tolerance = 0 if self._dry else LEAK_TOLERANCE
        lost = before - settled(self._free, before, tolerance)
        self._recorder.check(
            f"{name}: nothing leaked", abs(lost) <= tolerance, f"{lost / 1e6:.1f} MB of {before / 1e9:.1f} GB"
        )
