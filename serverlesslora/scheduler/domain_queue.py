"""The asks of one domain that wait, and who of its tenants is next.

Fair shares decide between tenants; inside one tenant the ask that must start first, then the one that arrived first.
Some slots of a worker are kept for others: a tenant that has its equal share of them already is not given the last
free ones while another tenant was active a moment ago. A flood would otherwise hold all slots, and a tenant that asks
once in a second would wait for somebody else's answer to end each time, however fair the order of the queue is. It
costs a flood one slot in eight and one more, and only while it is not alone. (Keeping as many as the others used at
once lately was tried: it costs more and helps no more.)
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from serverlesslora.scheduler.asks import Ask
from serverlesslora.scheduler.fair_share import FairShare

ACTIVE_S = 10.0  # after its last sign of life a tenant counts as somebody who will come back
SLOTS_PER_SPARE = 8

Key = tuple[float, float, int]  # latest start, arrival, number
Rank = tuple[float, Key, str]  # counter, key of its first ask, tenant


@dataclass(slots=True, eq=False)
class Batch:
    """What was sent to a worker at once."""

    tokens: int = 0  # all that it had to prefill then
    num_batches: int = 1  # on its device


@dataclass(slots=True, eq=False)
class Entry:
    """An ask from its offer to its end."""

    ask: Ask
    key: Key
    owner: str
    deadline: float
    expires_at: float
    queued_at: float
    need: int  # slots
    is_waiting: bool = True
    sent_at: float = 0.0
    batch: Batch | None = None  # it was sent in
    has_token: bool = False
    charged: tuple[int, float] = (0, 0.0)  # prompt tokens, output tokens


_key = attrgetter("key")


@dataclass(slots=True, eq=False)
class Line:
    """The asks of one tenant, first one first. A sorted list: the position of an ask is needed, not only the first,
    and most are appended."""

    owner: str
    entries: list[Entry] = field(default_factory=list)
    start: int = 0  # those before have gone; cut off now and then
    running: int = 0  # slots
    rank: Rank | None = None  # of its one valid place in the order of lines

    def __len__(self) -> int:
        return len(self.entries) - self.start

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries[self.start :])

    @property
    def first(self) -> Entry:
        return self.entries[self.start]

    @property
    def last(self) -> Entry:
        return self.entries[-1]

    def num_before(self, key: Key) -> int:
        return bisect_left(self.entries, key, lo=self.start, key=_key) - self.start

    def add(self, entry: Entry) -> None:
        if not self or self.entries[-1].key < entry.key:
            self.entries.append(entry)
        else:
            self.entries.insert(self.start + self.num_before(entry.key), entry)

    def remove(self, entry: Entry) -> None:
        at = self.start + self.num_before(entry.key)
        assert self.entries[at] is entry
        if at > self.start:
            del self.entries[at]
            return
        self.start += 1
        if self.start * 2 >= len(self.entries):
            del self.entries[: self.start]
            self.start = 0


class Candidate(NamedTuple):
    """Who would be sent next; if nobody, until when to wait for that to change without an event."""

    entry: Entry | None
    held_until: float | None = None


class DomainQueue:
    def __init__(self, slots: int, share: FairShare) -> None:
        self.slots = slots
        self._spare = min(slots // 2, 1 + slots // SLOTS_PER_SPARE)
        self._share = share
        self._lines: dict[str, Line] = {}
        self._order: list[Rank] = []  # of lines with somebody waiting; lazily, `Line.rank` is the valid one
        self._signs: OrderedDict[str, float] = OrderedDict()  # tenant -> its last sign of life, oldest first
        self.num_waiting = 0
        self.num_waiting_slots = 0
        self.num_lines = 0  # with somebody waiting
        self.num_running = 0  # slots

    def add(self, entry: Entry, now: float) -> None:
        self._sign(entry.owner, now)
        self.num_active(now)  # forgets who is gone
        self._share.arrived(entry.owner)
        line = self._lines.get(entry.owner)
        if line is None:
            line = self._lines[entry.owner] = Line(entry.owner)
        self.num_lines += not line
        line.add(entry)
        self.num_waiting += 1
        self.num_waiting_slots += entry.need
        if line.first is entry:
            self._rank(line)

    def remove(self, entry: Entry) -> None:
        """It will not be sent."""
        self._leave(entry)
        self._rest(self._lines[entry.owner])

    def next_up(self, now: float) -> Candidate:
        """Changes nothing. Nobody overtakes an ask that needs more slots than are free: it would wait for ever."""
        free = self.slots - self.num_running
        if free <= 0 or not self.num_waiting:
            return Candidate(None)
        passed: list[Rank] = []
        found = Candidate(None)
        while self._order:
            rank = self._order[0]
            line = self._lines.get(rank[2])
            if line is None or line.rank is not rank:
                heapq.heappop(self._order)
                continue
            current = (self._share.key(line.owner), line.first.key, line.owner)
            if current != rank:
                line.rank = current
                heapq.heapreplace(self._order, current)
                continue
            if not self._is_held(line, now):
                found = Candidate(line.first if line.first.need <= free else None)
                break
            passed.append(heapq.heappop(self._order))
        else:
            found = Candidate(None, next(iter(self._signs.values())) + ACTIVE_S)
        for rank in passed:
            heapq.heappush(self._order, rank)
        return found

    def take(self, entry: Entry, output_tokens: float) -> None:
        """It is sent; what it will probably cost is charged now, or a flood would fill all slots before it pays."""
        self._leave(entry)
        entry.charged = (entry.ask.prompt_tokens, output_tokens)
        self._share.charge(entry.owner, *entry.charged)
        self._lines[entry.owner].running += entry.need
        self.num_running += entry.need

    def release(self, entry: Entry, now: float, prompt_tokens: int, output_tokens: int) -> None:
        """It has ended; what it did cost is charged."""
        line = self._lines[entry.owner]
        line.running -= entry.need
        self.num_running -= entry.need
        self._share.charge(entry.owner, prompt_tokens - entry.charged[0], output_tokens - entry.charged[1])
        self._sign(entry.owner, now)
        self._rest(line)
        if line.rank is not None:
            self._rank(line)  # a correction may have moved it forwards

    # --- queries

    def num_of(self, owner: str) -> int:
        return len(line) if (line := self._lines.get(owner)) else 0

    def num_before(self, owner: str, key: Key) -> int:
        """How many would be sent before an ask of this tenant: its own, and as many of each other tenant plus one."""
        own = line.num_before(key) if (line := self._lines.get(owner)) else 0
        waits = bool(line)
        others = self.num_waiting - (len(line) if line else 0)
        return own + min(others, (own + 1) * (self.num_lines - waits))

    def num_active(self, now: float) -> int:
        """Tenants that wait, run or did so a moment ago."""
        while self._signs:
            owner, last = next(iter(self._signs.items()))
            if last + ACTIVE_S > now:
                break
            line = self._lines.get(owner)
            if line is not None and (line or line.running):
                self._sign(owner, now)
            else:
                del self._signs[owner]
                self._lines.pop(owner, None)
        return len(self._signs)

    def longest_line(self) -> Line:
        """O(tenants)."""
        return max(self._lines.values(), key=len)

    def waiting_by_tenant(self) -> dict[str, int]:
        return {owner: len(line) for owner, line in self._lines.items() if line}

    def check(self) -> None:
        self._share.check()
        waiting = [entry for line in self._lines.values() for entry in line]
        assert self.num_waiting == len(waiting)
        assert self.num_waiting_slots == sum(entry.need for entry in waiting)
        assert self.num_running == sum(line.running for line in self._lines.values()) <= self.slots
        assert self.num_lines == sum(1 for line in self._lines.values() if line)
        assert self._lines.keys() == self._signs.keys()
        for owner, line in self._lines.items():
            keys = [entry.key for entry in line]
            assert keys == sorted(keys) and all(entry.owner == owner for entry in line)
            assert (line.rank is not None) == bool(line)
            assert line.rank is None or sum(rank is line.rank for rank in self._order) == 1
            assert line.rank is None or line.rank[:2] <= (self._share.key(owner), line.first.key)

    # --- parts

    def _is_held(self, line: Line, now: float) -> bool:
        """Has this tenant its share already, and are the free slots the ones kept for others?"""
        need = line.first.need
        if not line.running or self.slots - self.num_running - need >= self._spare:
            return False
        num_active = self.num_active(now)
        return num_active > 1 and line.running + need > self.slots / num_active

    def _leave(self, entry: Entry) -> None:
        line = self._lines[entry.owner]
        line.remove(entry)
        self.num_lines -= not line
        self.num_waiting -= 1
        self.num_waiting_slots -= entry.need
        if not line:
            line.rank = None  # otherwise it is as it was or worse: next_up() corrects it when it comes first

    def _rest(self, line: Line) -> None:
        if not line and not line.running:
            self._share.left(line.owner)

    def _rank(self, line: Line) -> None:
        line.rank = (self._share.key(line.owner), line.first.key, line.owner)
        heapq.heappush(self._order, line.rank)
        if len(self._order) > 4 * self.num_lines + 64:
            self._order = [line.rank for line in self._lines.values() if line.rank is not None]
            heapq.heapify(self._order)

    def _sign(self, owner: str, now: float) -> None:
        self._signs[owner] = now
        self._signs.move_to_end(owner)
