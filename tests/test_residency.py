"""Byte-seconds are exact whatever happens between two looks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.gateway.residency import ResidencyMeter, Resident

WORKER = Resident("worker", 100, domain="d")


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + 1e9


def meter(clock: Clock) -> ResidencyMeter:
    return ResidencyMeter(clock=clock.monotonic, wall_clock=clock.wall)


def test_what_comes_goes_and_changes_size() -> None:
    clock = Clock()
    counted = meter(clock)
    counted.update({"worker:d": WORKER})
    clock.now += 10
    counted.update({"worker:d": Resident("worker", 300, domain="d"), "backbone:b": Resident("backbone", 1000)})
    clock.now += 5
    counted.update({"backbone:b": Resident("backbone", 1000)})
    rows = [(row.artifact_id, row.size_bytes, row.seconds, row.from_at) for row in counted.take()]
    assert rows == [
        ("worker:d", 100, 10.0, 50 + 1e9),
        ("worker:d", 300, 5.0, 60 + 1e9),
        ("backbone:b", 1000, 5.0, 60 + 1e9),
    ]
    clock.now += 1
    assert [(row.artifact_id, row.seconds, row.from_at) for row in counted.take()] == [("backbone:b", 1.0, 65 + 1e9)]


def test_nothing_is_held_for_no_time() -> None:
    counted = meter(Clock())
    counted.update({"worker:d": WORKER})
    counted.update({})
    assert counted.take() == []


Steps = st.lists(
    st.tuples(st.floats(0, 100), st.dictionaries(st.sampled_from("abc"), st.integers(1, 9)), st.booleans()), max_size=30
)


@given(Steps)
def test_sums_equal_the_integral_however_often_it_is_read(steps: list[tuple[float, dict[str, int], bool]]) -> None:
    clock = Clock()
    counted = meter(clock)
    expected = 0.0
    present: dict[str, int] = {}
    rows = []
    for seconds, following, reads in steps:
        clock.now += seconds
        expected += seconds * sum(present.values())
        present = following
        counted.update({name: Resident("worker", size) for name, size in present.items()})
        if reads:
            rows += counted.take()
    rows += counted.take()
    assert abs(sum(row.byte_s for row in rows) - expected) <= 1e-6 * max(1.0, expected)
