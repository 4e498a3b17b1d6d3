"""A range of device addresses that never move, behind which memory comes and goes in chunks."""

from __future__ import annotations

from contextlib import ExitStack

from serverlesslora_ipc.cuda.driver import Driver, round_up


class ElasticRange:
    """Readable and writable where a chunk is resident; touching it elsewhere is a fault of this process.

    Tensors over the whole range stay valid as objects. The caller sees to it that nothing on the device touches a
    chunk from before `unmap_chunk` on. What a new chunk holds is undefined. One thread at a time.
    """

    def __init__(self, driver: Driver, capacity_bytes: int, chunk_bytes: int) -> None:
        """Takes addresses only. Capacity is rounded up to whole chunks; `chunk_size` gives valid sizes of those."""
        assert capacity_bytes > 0 and chunk_bytes > 0 and chunk_bytes % driver.granularity() == 0
        self.chunk_bytes = chunk_bytes
        self.num_chunks = -(-capacity_bytes // chunk_bytes)
        self.capacity_bytes = self.num_chunks * chunk_bytes
        self._driver = driver
        self._resident: set[int] = set()
        self._closed = False
        self.address = driver.reserve(self.capacity_bytes)

    @staticmethod
    def chunk_size(driver: Driver, wanted_bytes: int) -> int:
        """The smallest chunk that this device allows and that holds `wanted_bytes`."""
        return round_up(max(1, wanted_bytes), driver.granularity())

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self._resident)

    @property
    def resident_bytes(self) -> int:
        return len(self._resident) * self.chunk_bytes

    def is_resident(self, chunk: int) -> bool:
        return chunk in self._resident

    def chunk_address(self, chunk: int) -> int:
        assert 0 <= chunk < self.num_chunks
        return self.address + chunk * self.chunk_bytes

    def map_chunk(self, chunk: int) -> None:
        """Puts memory behind the chunk. On any error, OutOfDeviceMemory included, nothing has changed."""
        assert not self._closed and chunk not in self._resident
        driver, address, size = self._driver, self.chunk_address(chunk), self.chunk_bytes
        physical = driver.create(size)
        try:
            with ExitStack() as undo:
                driver.map(address, size, physical)
                undo.callback(driver.unmap, address, size)
                driver.allow(address, size, write=True)
                undo.pop_all()
        finally:
            driver.release(physical)  # the mapping alone holds the memory, so unmapping returns it
        self._resident.add(chunk)

    def unmap_chunk(self, chunk: int) -> None:
        """Gives the chunk's memory back to the device, where any process may take it."""
        assert chunk in self._resident
        self._driver.unmap(self.chunk_address(chunk), self.chunk_bytes)
        self._resident.remove(chunk)

    def check(self) -> None:
        """Asserts what always holds."""
        assert all(0 <= chunk < self.num_chunks for chunk in self._resident)
        assert not (self._closed and self._resident)

    def close(self) -> None:
        """Safe to call twice."""
        if self._closed:
            return
        for chunk in sorted(self._resident):
            self.unmap_chunk(chunk)
        self._driver.free_address(self.address, self.capacity_bytes)
        self._closed = True

    def __enter__(self) -> ElasticRange:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
