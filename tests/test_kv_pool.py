"""The pool that grows and shrinks the KV cache: what it decides, what it undoes, and that no block lies on memory that
is gone, over random histories with a device that refuses at random and over real mappings."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.kv_pool import KvPool, plan_growth, plan_shrinkage
from serverlesslora.engine.scheduler import Scheduler
from serverlesslora.engine.sequence import Sequence
from serverlesslora_ipc.cuda.driver import OutOfDeviceMemory
from serverlesslora_ipc.cuda.elastic import ElasticRange
from serverlesslora_ipc.cuda.emulated import BYTES_VARIABLE, DEVICE_VARIABLE, GRANULARITY, EmulatedDriver

SIZE = 4  # tokens of a block
PER_CHUNK = 3  # blocks
CHUNK_BYTES = 1000


@dataclass
class CountedDevice:
    """A device that is nothing but a number."""

    free_bytes: int


@dataclass
class CountedMemory:
    device: CountedDevice
    rng: random.Random = field(default_factory=random.Random)
    refuses: float = 0.0  # how often, for no visible reason
    mapped: set[int] = field(default_factory=set)
    num_calls: int = 0

    def map(self, chunk: int) -> None:
        self.num_calls += 1
        assert chunk not in self.mapped
        if self.device.free_bytes < CHUNK_BYTES or self.rng.random() < self.refuses:
            raise OutOfDeviceMemory("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY")
        self.device.free_bytes -= CHUNK_BYTES
        self.mapped.add(chunk)

    def unmap(self, chunk: int) -> None:
        self.num_calls += 1
        self.mapped.remove(chunk)
        self.device.free_bytes += CHUNK_BYTES

    def free_bytes(self) -> int:
        return self.device.free_bytes


def pool_of(
    num_chunks: int, device: CountedDevice, *, reserve_bytes: int = 0, prefix_cache: bool = True
) -> tuple[KvPool, BlockManager, CountedMemory]:
    blocks = BlockManager(num_chunks * PER_CHUNK, SIZE, blocks_per_chunk=PER_CHUNK, prefix_cache=prefix_cache)
    memory = CountedMemory(device)
    return KvPool(blocks, memory, chunk_bytes=CHUNK_BYTES, reserve_bytes=reserve_bytes), blocks, memory


def admitted(blocks: BlockManager, num_blocks: int, *, token: int = 0) -> Sequence:
    sequence = Sequence(0, "", [token] * (num_blocks * SIZE), num_blocks * SIZE)
    blocks.admit(sequence, [])
    return sequence


# --- decisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "resident", "absent", "affordable", "expected"),
    [
        (1, 0, 9, 9, (1, 0)),  # the first request takes what it needs
        (5, 0, 9, 9, (5, 0)),
        (1, 8, 99, 99, (1, 7)),  # at most as much again as there is
        (1, 8, 4, 99, (1, 3)),  # at most the capacity
        (1, 8, 99, 9, (1, 2)),  # at most a quarter of what the device has left
        (1, 8, 99, 1, (1, 0)),
        (1, 8, 99, 0, (0, 0)),
        (3, 8, 99, 2, (0, 0)),  # some of them would be of no use
    ],
)
def test_growth(needed: int, resident: int, absent: int, affordable: int, expected: tuple[int, int]) -> None:
    growth = plan_growth(needed, num_resident=resident, num_absent=absent, affordable=affordable)
    assert (growth.needed, growth.ahead) == expected
    assert growth.reason


def test_shrinkage_takes_blank_chunks_first_and_high_ones_before_low_ones() -> None:
    chunks = plan_shrinkage(blank=[2, 5], removable=[1, 2, 4, 5], num_resident=6, keep_chunks=0).chunks
    assert chunks == [5, 2, 4, 1]
    assert plan_shrinkage(blank=[2, 5], removable=[1, 2, 4, 5], num_resident=4, keep_chunks=1).chunks == [5, 2, 4]
    assert plan_shrinkage(blank=[2, 5], removable=[2, 5], num_resident=6, keep_chunks=5).chunks == [5]
    assert plan_shrinkage(blank=[2, 5], removable=[2, 5], num_resident=6, keep_chunks=9).chunks == []


# --- one pool -------------------------------------------------------------------------------------------------------


def test_holds_nothing_until_asked_and_grows_seldom() -> None:
    pool, blocks, memory = pool_of(64, CountedDevice(1000 * CHUNK_BYTES))
    assert blocks.num_free == blocks.num_used == pool.resident_bytes == 0
    growths = 0
    for _ in range(64 * PER_CHUNK):
        if blocks.num_free == 0:
            assert pool.make_room(1)
            growths += 1
        admitted(blocks, 1)
    assert pool.num_resident_chunks == 64 and memory.mapped == set(range(64))
    assert growths == 7, "doubling"
    assert not pool.make_room(1)
    assert pool.last_reason == "1 chunks needed, 0 left of the capacity"


def test_free_blocks_and_cached_prefixes_are_used_before_memory() -> None:
    pool, blocks, memory = pool_of(8, CountedDevice(100 * CHUNK_BYTES))
    assert pool.make_room(2 * PER_CHUNK) and pool.num_resident_chunks == 2
    cached = admitted(blocks, 2 * PER_CHUNK)
    cached.num_computed = cached.num_tokens
    blocks.publish(cached)
    blocks.release(cached)
    calls = memory.num_calls
    assert pool.make_room(2 * PER_CHUNK) and memory.num_calls == calls
    assert pool.make_room(2 * PER_CHUNK + 1) and pool.num_resident_chunks > 2


def test_leaves_the_reserve_to_others() -> None:
    device = CountedDevice(5 * CHUNK_BYTES - 1)
    pool, blocks, _ = pool_of(8, device, reserve_bytes=2 * CHUNK_BYTES)
    assert pool.make_room(2 * PER_CHUNK)
    assert device.free_bytes >= 2 * CHUNK_BYTES
    admitted(blocks, 2 * PER_CHUNK)
    assert not pool.make_room(1)
    assert pool.last_reason == "1 chunks needed, the device has room for 0"
    device.free_bytes += 1
    assert pool.make_room(1) and device.free_bytes == 2 * CHUNK_BYTES


def test_reserve_is_looked_at_while_others_take_memory() -> None:
    device = CountedDevice(9 * CHUNK_BYTES)
    pool, _, memory = pool_of(8, device, reserve_bytes=CHUNK_BYTES)

    def map_while_another_process_does(chunk: int) -> None:
        CountedMemory.map(memory, chunk)
        device.free_bytes -= CHUNK_BYTES

    memory.map = map_while_another_process_does  # type: ignore[method-assign]
    assert not pool.make_room(6 * PER_CHUNK)
    assert pool.resident_bytes == 0 and not memory.mapped
    assert device.free_bytes == 5 * CHUNK_BYTES, "all of ours came back"


def test_takes_all_that_is_needed_or_nothing() -> None:
    device = CountedDevice(100 * CHUNK_BYTES)
    pool, blocks, memory = pool_of(8, device)
    assert pool.make_room(1)
    real_map = memory.map

    def refuse_the_fourth(chunk: int) -> None:
        if chunk == 4:
            raise OutOfDeviceMemory("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY")
        real_map(chunk)

    memory.map = refuse_the_fourth  # type: ignore[method-assign]
    before = device.free_bytes
    assert not pool.make_room(6 * PER_CHUNK)
    assert memory.mapped == {0} and device.free_bytes == before
    assert blocks.num_resident == PER_CHUNK
    calls = memory.num_calls
    assert not pool.make_room(6 * PER_CHUNK)
    assert memory.num_calls == calls, "the same is not tried again in each step"
    assert pool.make_room(3 * PER_CHUNK), "less is"
    memory.map = real_map  # type: ignore[method-assign]
    assert pool.make_room(6 * PER_CHUNK)


def test_refusal_is_not_for_ever() -> None:
    pool, _, memory = pool_of(8, CountedDevice(100 * CHUNK_BYTES))
    memory.refuses = 1.0
    assert not pool.make_room(1)
    memory.refuses = 0.0
    asked = next(attempt for attempt in range(1000) if pool.make_room(1))
    assert asked == 64


def test_refusal_ends_when_the_device_has_more() -> None:
    device = CountedDevice(2 * CHUNK_BYTES)
    pool, _, memory = pool_of(8, device)
    memory.refuses = 1.0
    assert not pool.make_room(1)
    memory.refuses = 0.0
    device.free_bytes += 1
    assert pool.make_room(1)


@pytest.mark.parametrize("keep_cached", [True, False])
def test_gives_back_what_is_not_in_use(keep_cached: bool) -> None:
    device = CountedDevice(100 * CHUNK_BYTES)
    pool, blocks, memory = pool_of(8, device)
    assert pool.make_room(6 * PER_CHUNK)
    running = admitted(blocks, PER_CHUNK + 1, token=1)  # chunks 0 and 1
    cached = admitted(blocks, PER_CHUNK, token=2)  # chunks 1 and 2
    cached.num_computed = cached.num_tokens
    blocks.publish(cached)
    blocks.release(cached)
    returned = pool.give_back(keep_cached=keep_cached)
    assert memory.mapped == ({0, 1, 2} if keep_cached else {0, 1})
    assert returned == (3 if keep_cached else 4) * CHUNK_BYTES
    assert pool.resident_bytes == len(memory.mapped) * CHUNK_BYTES == 100 * CHUNK_BYTES - device.free_bytes
    blocks.check([running])
    again = Sequence(1, "", [2] * (PER_CHUNK * SIZE + 1), PER_CHUNK * SIZE)
    # Two of its blocks lay beside the running sequence, but a chain ends at the first block that is gone.
    assert len(blocks.find_prefix(again)) == (3 if keep_cached else 2)
    assert pool.give_back(keep_cached=keep_cached) == 0


def test_keeps_chunks_for_the_next_request() -> None:
    pool, _, memory = pool_of(8, CountedDevice(100 * CHUNK_BYTES))
    assert pool.make_room(5 * PER_CHUNK)
    assert pool.give_back(keep_cached=True) == 4 * CHUNK_BYTES
    assert memory.mapped == {0}
    assert pool.give_back(keep_cached=True, keep_chunks=0) == CHUNK_BYTES
    assert pool.give_back(keep_cached=False, keep_chunks=0) == 0


# --- two pools on one device ----------------------------------------------------------------------------------------


def test_an_idle_domain_serves_a_busy_one_and_gets_its_memory_back() -> None:
    device = CountedDevice(8 * CHUNK_BYTES)
    (pool_a, blocks_a, _), (pool_b, blocks_b, _) = pool_of(8, device), pool_of(8, device)

    def serve(pool: KvPool, blocks: BlockManager) -> Sequence | None:
        """A request that needs all the device has but one chunk."""
        return admitted(blocks, 7 * PER_CHUNK) if pool.make_room(7 * PER_CHUNK) else None

    for _ in range(3):
        for pool, blocks, other, other_blocks in (
            (pool_a, blocks_a, pool_b, blocks_b),
            (pool_b, blocks_b, pool_a, blocks_a),
        ):
            running = serve(pool, blocks)
            assert running is not None
            assert serve(other, other_blocks) is None
            assert pool.give_back(keep_cached=False) == 0, "nothing is taken from a busy domain"
            blocks.release(running)
            assert serve(other, other_blocks) is None, "it has not been told to shrink yet"
            pool.give_back(keep_cached=False)
            assert pool.resident_bytes == CHUNK_BYTES
    pool_a.give_back(keep_cached=False, keep_chunks=0)
    pool_b.give_back(keep_cached=False, keep_chunks=0)
    assert device.free_bytes == 8 * CHUNK_BYTES


# --- random histories -----------------------------------------------------------------------------------------------


class Domain:
    """A scheduler on a pool, with requests that come, decode and end."""

    def __init__(self, rng: random.Random, blocks: BlockManager, pool: KvPool) -> None:
        self.rng = rng
        self.blocks = blocks
        self.pool = pool
        self.scheduler = Scheduler(
            blocks, max_running=rng.randint(2, 8), max_step_tokens=rng.randint(4, 40), make_room=pool.make_room
        )
        self.lengths: dict[Sequence, int] = {}
        self.num_ended = 0
        self._next_id = 0

    def submit(self) -> None:
        tokens = [int(self.rng.randrange(10) == 0) for _ in range(self.rng.randint(1, 24))]
        sequence = Sequence(self._next_id, self.rng.choice("ab"), tokens, len(tokens))
        self._next_id += 1
        self.lengths[sequence] = len(tokens) + self.rng.randint(1, 16)
        self.scheduler.add(sequence)

    def abort(self) -> None:
        if self.lengths:
            self._end(self.rng.choice(list(self.lengths)), forget=self.rng.random() < 0.3)

    def step(self) -> list[tuple[Sequence, int, int]]:
        """What was computed: a sequence and which of its blocks are now full."""
        work = self.scheduler.schedule()
        full = [(item.sequence, item.start // SIZE, item.end // SIZE) for item in work]
        self.scheduler.commit(work)
        return full

    def sample(self) -> None:
        for sequence in list(self.scheduler.running):
            if sequence.num_pending == 0:
                sequence.token_ids.append(self.rng.randrange(2))
                if sequence.num_tokens >= self.lengths[sequence]:
                    self._end(sequence)
                    self.num_ended += 1

    def _end(self, sequence: Sequence, *, forget: bool = False) -> None:
        self.scheduler.remove(sequence, forget=forget)
        del self.lengths[sequence]

    def act(self) -> None:
        """Something besides computing."""
        action = self.rng.random()
        if action < 0.35:
            self.submit()
        elif action < 0.4:
            self.abort()
        elif action < 0.5:
            before = self.pool.resident_bytes
            keep = self.rng.randint(0, 2)
            returned = self.pool.give_back(keep_cached=self.rng.random() < 0.5, keep_chunks=keep)
            assert before - self.pool.resident_bytes == returned
            assert not returned or self.pool.num_resident_chunks >= keep
        elif action < 0.6:
            wanted, before = self.rng.randint(1, self.blocks.num_blocks), self.pool.resident_bytes
            if self.pool.make_room(wanted):
                assert self.blocks.num_free >= wanted
            else:
                assert self.pool.resident_bytes == before

    def touched(self) -> set[int]:
        """Blocks whose memory somebody may read or write: used by a sequence, or known under a prefix key."""
        return {block for sequence in self.lengths for block in sequence.block_ids} | set(
            self.blocks._published.values()
        )


@pytest.mark.parametrize("seed", range(12))
def test_no_block_lies_on_memory_that_is_gone(seed: int) -> None:
    rng = random.Random(seed)
    num_chunks = rng.randint(5, 9)
    device = CountedDevice(num_chunks * CHUNK_BYTES)
    pool, blocks, memory = pool_of(num_chunks, device, reserve_bytes=CHUNK_BYTES if seed % 2 else 0)
    memory.rng, memory.refuses = random.Random(seed + 1000), 0.2
    domain, others = Domain(rng, blocks, pool), 0
    mapped_again, ever = 0, set[int]()

    def check() -> None:
        nonlocal mapped_again, ever
        domain.scheduler.check()
        assert memory.mapped == {chunk for chunk in range(num_chunks)} - set(blocks.absent_chunks())
        assert {block // PER_CHUNK for block in domain.touched()} <= memory.mapped
        assert device.free_bytes + (len(memory.mapped) + others) * CHUNK_BYTES == num_chunks * CHUNK_BYTES
        mapped_again += len((memory.mapped - before) & ever)
        ever |= memory.mapped

    for step in range(600):
        before = set(memory.mapped)
        if rng.random() < 0.3:  # other processes take and return memory
            change = rng.choice([others and -1, int(device.free_bytes >= CHUNK_BYTES)])
            others += change
            device.free_bytes -= change * CHUNK_BYTES
        if step < 450:
            domain.act()
        check()
        before = set(memory.mapped)
        domain.step()
        check()
        domain.sample()
        check()
    device.free_bytes, others, memory.refuses = device.free_bytes + others * CHUNK_BYTES, 0, 0.0
    for _ in range(2000):
        if not domain.lengths:
            break
        before = set(memory.mapped)
        domain.step()
        domain.sample()
        check()
    assert not domain.lengths, "starved"
    assert domain.num_ended > 20 and mapped_again > 5, "too little happened to prove anything"
    pool.give_back(keep_cached=False, keep_chunks=0)
    assert device.free_bytes == num_chunks * CHUNK_BYTES


# --- over real mappings ---------------------------------------------------------------------------------------------

BLOCK_BYTES = GRANULARITY // PER_CHUNK // 16 * 16  # a few bytes at the end of each chunk stay unused


class MappedMemory:
    """A range of the emulated device, where each block carries the mark of the tokens computed into it."""

    def __init__(self, driver: EmulatedDriver, num_chunks: int) -> None:
        self.driver = driver
        self.range = ElasticRange(driver, num_chunks * GRANULARITY, GRANULARITY)

    def map(self, chunk: int) -> None:
        self.range.map_chunk(chunk)

    def unmap(self, chunk: int) -> None:
        self.range.unmap_chunk(chunk)

    def free_bytes(self) -> int:
        return self.driver.memory().free_bytes

    def write(self, block: int, mark: bytes) -> None:
        address = self._address(block)
        ctypes.memmove(address, mark, len(mark))
        ctypes.memmove(address + BLOCK_BYTES - len(mark), mark, len(mark))

    def read(self, block: int) -> bytes:
        address = self._address(block)
        head, tail = ctypes.string_at(address, 16), ctypes.string_at(address + BLOCK_BYTES - 16, 16)
        assert head == tail
        return head

    def _address(self, block: int) -> int:
        chunk, place = divmod(block, PER_CHUNK)
        assert self.range.is_resident(chunk), "the next instruction would be a fault"
        return self.range.chunk_address(chunk) + place * BLOCK_BYTES


def mark_of(sequence: Sequence, index: int) -> bytes:
    tokens = bytes(sequence.token_ids[: (index + 1) * SIZE])
    return hashlib.blake2b(sequence.adapter.encode() + tokens, digest_size=16).digest()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[EmulatedDriver]:
    # Other test runs of this machine must not share the device: its free bytes are counted here.
    monkeypatch.setenv(DEVICE_VARIABLE, f"kv-pool-{random.SystemRandom().randrange(1 << 32)}")
    monkeypatch.setenv(BYTES_VARIABLE, str(6 * GRANULARITY))
    driver = EmulatedDriver()
    driver.start()
    yield driver
    driver.stop()


@pytest.mark.parametrize("seed", range(3))
def test_two_domains_keep_their_bytes_on_one_device(driver: EmulatedDriver, seed: int) -> None:
    """Both have addresses for nearly the whole device, so they only get along by giving back."""
    rng = random.Random(seed)
    memories = [MappedMemory(driver, 5) for _ in range(2)]
    domains = []
    for memory in memories:
        blocks = BlockManager(5 * PER_CHUNK, SIZE, blocks_per_chunk=PER_CHUNK, salt=seed)
        domains.append(Domain(rng, blocks, KvPool(blocks, memory, chunk_bytes=GRANULARITY)))
    hits = 0
    for turn in range(160):
        busy = turn // 20 % 2  # one has much to do while the other has nothing
        for domain, memory in zip(domains, memories, strict=True):
            if domain is domains[busy]:
                domain.act()
            elif not domain.lengths:
                domain.pool.give_back(keep_cached=turn % 20 < 10, keep_chunks=0)
            computed = domain.step()
            for sequence, first, end in computed:
                hits += first > 0 and sequence.num_cached == first * SIZE
                for index in range(first, end):
                    memory.write(sequence.block_ids[index], mark_of(sequence, index))
            domain.sample()
            domain.scheduler.check()
            memory.range.check()
            assert memory.range.resident_bytes == domain.pool.resident_bytes
            for sequence in domain.scheduler.running:
                for index in range(sequence.num_computed // SIZE):
                    assert memory.read(sequence.block_ids[index]) == mark_of(sequence, index)
        if turn % 10 == 9:
            held = sum(domain.pool.resident_bytes for domain in domains)
            assert driver.memory().free_bytes == 6 * GRANULARITY - held
    assert hits > 10 and all(domain.num_ended > 10 for domain in domains), "too little happened to prove anything"
    for domain in domains:
        while domain.lengths:
            domain.abort()
        domain.pool.give_back(keep_cached=False, keep_chunks=0)
    assert driver.memory().free_bytes == 6 * GRANULARITY
    for memory in memories:
        memory.range.close()
