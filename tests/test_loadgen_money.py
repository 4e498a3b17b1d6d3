"""What a run cost: prices, sums over time, two ways to measure, and baselines, held against sums done by hand."""

from __future__ import annotations

import datetime
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.metering.export import report_usage
from serverlesslora.metering.prices import TokenPrices
from serverlesslora.metering.prices import read_prices as read_server_prices
from serverlesslora.metering.usage import UsageRow
from serverlesslora_loadgen.errors import ObjectiveError
from serverlesslora_loadgen.ledger import Ledger
from serverlesslora_loadgen.money.account import account
from serverlesslora_loadgen.money.baselines import (
    Instance,
    always_on,
    baseline_cost,
    device_s_of_all,
    instance_of,
    keep_alive_name,
    kept_alive,
    work_of_all,
)
from serverlesslora_loadgen.money.cost import device_seconds, ledger_cost, lifetimes_cost, work_of
from serverlesslora_loadgen.money.prices import GbSecond, Prices, read_prices
from serverlesslora_loadgen.money.spans import Level, Span, length, union
from serverlesslora_loadgen.observe import Sample
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Cost, Money
from tests.server import ROOT

GB = 10**9
PRICES = Prices(
    date=datetime.date(2026, 11, 1),
    source="a test",
    currency="EUR",
    device_second={"default": 2.0, "H200": 7.0},
    gb_second=GbSecond(host=3.0, device=11.0),
    request=0.5,
)


def record(begin: float, end: float | None, model: str = "a", *, outcome: str = "ok", tokens: int = 10) -> Record:
    answered = outcome == "ok"
    return msgspec.convert(
        {
            "id": 0,
            "model": model,
            "intended_s": begin,
            "written_s": None if outcome == "unsent" else begin,
            "last_token_s": end if answered else None,
            "done_s": end,
            "outcome": outcome,
            "output_tokens": tokens if answered else 0,
        },
        Record,
    )


def parts(cost: Cost) -> dict[str, float]:
    return {part.name: part.amount for part in cost.parts}


# --- prices


def test_the_built_in_prices_say_that_they_illustrate_and_are_the_servers() -> None:
    prices = read_prices()
    assert prices.illustrative and prices.label.startswith("illustrative prices of 2026-11-01 in USD")
    server = ROOT / "serverlesslora" / "metering" / "prices.toml"
    assert msgspec.structs.replace(prices, request=0.0) == read_prices(server)
    assert json.loads(json.dumps(prices.as_facts()))["illustrative"] is True


def test_a_price_file_of_the_server_can_be_given_as_it_is(tmp_path: Path) -> None:
    server = msgspec.structs.replace(read_server_prices(), tokens=TokenPrices(1.0, 2.0, 0.5))
    lines = (ROOT / "serverlesslora" / "metering" / "prices.toml").read_text()
    (tmp_path / "prices.toml").write_text(lines + "\n[tokens]\nprompt = 1.0\noutput = 2.0\ncached = 0.5\n")
    ours = read_prices(tmp_path / "prices.toml")
    for device in (None, "cpu", "NVIDIA H200 NVL", "nvidia l40s", "unheard of"):
        assert ours.device_price(device) == server.device_price(device)
    assert "tokens" not in ours.as_facts()


GOOD = """
date = 2026-01-31
source = "a bill"
currency = "EUR"
device_second = { default = 1.0 }
gb_second = { host = 1.0, device = 2.0 }
"""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("default = 1.0", "H100 = 1.0"), "default"),
        (("host = 1.0", "host = -1.0"), "gb_second.host"),
        (("default = 1.0", "default = inf"), "device_second.default"),
        (('"EUR"', '"€"'), "currency"),
        (("source", "sauce"), "sauce"),
        (("2026-01-31", '"soon"'), "date"),
        (("host = 1.0", "host = nan"), "gb_second.host"),
        (("{", "["), "bad price file"),
        (("date", "requests = 1\ndate"), "requests"),
    ],
)
def test_a_wrong_price_is_refused_by_name(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert read_prices(path).label == "prices of 2026-01-31 in EUR: a bill"
    assert change[0] in GOOD
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ObjectiveError, match=r"mine\.toml") as caught:
        read_prices(path)
    assert named in str(caught.value)
    with pytest.raises(ObjectiveError, match="cannot read the prices"):
        read_prices(tmp_path / "none.toml")


# --- time


TIMES = st.integers(-20, 120)
SPANS = st.lists(st.tuples(TIMES, TIMES).map(lambda each: Span(*each)), max_size=8)


@given(spans=SPANS)
def test_a_union_covers_what_any_span_covers_once(spans: list[Span]) -> None:
    merged = union(spans, within=Span(0, 100))
    covered = {at for at in range(100) if any(span.begin <= at < span.end for span in spans)}
    assert [at for span in merged for at in range(int(span.begin), int(span.end))] == sorted(covered)
    assert length(merged) == len(covered)
    assert all(a.end < b.begin for a, b in itertools.pairwise(merged))


@given(points=st.dictionaries(TIMES, st.integers(0, 50), min_size=1, max_size=8), spans=SPANS)
def test_a_level_is_summed_as_by_small_steps(points: dict[int, int], spans: list[Span]) -> None:
    """Whole seconds between whole numbers: lines are straight inside a step, so its middle is its mean."""
    level = Level(sorted(points.items()))
    merged = union(spans, within=Span(-20, 120))
    steps = (level.at(at + 0.5) for span in merged for at in range(int(span.begin), int(span.end)))
    assert level.sum_over(merged) == pytest.approx(math.fsum(steps), abs=1e-6)
    for at, value in points.items():
        assert level.at(at) == value


def test_a_level_is_straight_between_looks_and_level_outside() -> None:
    level = Level([(10.0, 2.0), (20.0, 4.0), (30.0, 4.0)])
    assert [level.at(at) for at in (0.0, 10.0, 15.0, 25.0, 99.0)] == [2.0, 2.0, 3.0, 4.0, 4.0]
    assert level.sum_over([Span(0.0, 40.0)]) == pytest.approx(20 + 30 + 40 + 40)
    assert level.sum_over([Span(15.0, 25.0), Span(32.0, 33.0)]) == pytest.approx(5 * 3.5 + 5 * 4 + 4)


# --- measured


SAMPLES = [  # 4 GB throughout; the adapters' part grows from 0 to 1 GB at the cost of the processes'
    Sample(0.0, 1, 4 * GB, {"backbone": 2 * GB, "adapters": 0, "workers": 1 * GB, "kv": 0, "other": GB}, 10.0),
    Sample(10.0, 2, 4 * GB, {"backbone": 2 * GB, "adapters": GB, "workers": 0, "kv": 0, "other": GB}, 13.0),
]
RECORDS = [record(0.0, 3.0), record(2.0, 4.0, "b"), record(8.0, 9.0, "b"), record(5.0, None, outcome="unsent")]


def lifetimes(
    samples: Sequence[Sample] = SAMPLES, records: Sequence[Record] = RECORDS, device: str | None = None
) -> Cost:
    cost = lifetimes_cost(samples, records, seconds=10.0, prices=PRICES, work=work_of(records, good=2), device=device)
    assert cost is not None
    return cost


def test_what_was_seen_is_paid_and_memory_is_idle_while_nobody_waits() -> None:
    """Requests are in flight during [0, 4) and [8, 9): 5 of 10 seconds."""
    cost = lifetimes()
    adapters = 0.1 * (4 * 2 + 1 * 8.5)  # GB-seconds of a line from 0 to 1 over 10 s, while busy
    assert parts(cost) == pytest.approx(
        {
            "backbone": 3 * 2 * 5,
            "adapters": 3 * adapters,
            "workers": 3 * (2 * 5 - adapters),  # with the other processes
            "compute": 2 * 3.0,
            "requests": 0.5 * 3,
            "idle": 3 * 4 * 5,
        }
    )
    assert cost.total == pytest.approx(3 * 40 + 6 + 1.5) == pytest.approx(sum(parts(cost).values()))
    assert cost.gb_seconds == pytest.approx(40) and cost.device_seconds == pytest.approx(3)
    assert cost.idle_share == pytest.approx(0.5)
    assert cost.per_1k_requests == pytest.approx(1000 * cost.total / 3)
    assert cost.per_1m_output_tokens == pytest.approx(1e6 * cost.total / 30)
    assert cost.per_good_request == pytest.approx(cost.total / 2)
    assert cost.effectiveness == pytest.approx(1 / (2.0 * cost.total))  # mean E2E: (3 + 2 + 1) / 3
    assert "counted by the server" in cost.how and cost.how.endswith(PRICES.label)


def test_a_device_nobody_counted_works_while_a_request_is_in_flight() -> None:
    samples = [Sample(each.at_s, None, each.held_bytes) for each in SAMPLES]
    cost = lifetimes(samples, device="cpu")
    assert cost.device_seconds == pytest.approx(5)
    assert parts(cost)["compute"] == pytest.approx(2 * 5)
    assert parts(cost)["workers"] == pytest.approx(3 * 4 * 5)  # what memory is for is not known
    assert "in which a request was in flight" in cost.how
    assert lifetimes_cost([Sample(0.0, 1)], RECORDS, seconds=10.0, prices=PRICES, work=work_of(RECORDS)) is None


def test_a_count_that_comes_after_the_last_answer_belongs_to_the_run() -> None:
    looks = [(-1.0, 0.0), (9.0, 5.0), (11.0, 9.0), (30.0, 90.0)]
    samples = [Sample(at, device_s=seconds) for at, seconds in looks]
    assert device_seconds(samples, 10.0) == pytest.approx(9 - 0.5)  # what was spent by 30 s is another run's
    assert device_seconds(samples[:2], 10.0) == pytest.approx(5 - 0.5)
    assert device_seconds([Sample(0.0)], 10.0) is None


@given(
    held=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6),
    spans=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=6),
)
def test_parts_add_up_to_the_total_and_idle_to_what_was_not_busy(
    held: list[tuple[int, int, int]], spans: list[tuple[int, int]]
) -> None:
    samples = [
        Sample(2.0 * at, 1, (a + b + c) * GB, {"backbone": a * GB, "adapters": b * GB, "kv": c * GB})
        for at, (a, b, c) in enumerate(held)
    ]
    records = [record(begin, begin + each) for begin, each in spans]
    cost = lifetimes(samples, records)
    found = parts(cost)
    assert min(found.values()) >= -1e-6
    assert cost.total == pytest.approx(sum(found.values()))
    memory = found["backbone"] + found["adapters"] + found["workers"]
    assert memory + found["idle"] == pytest.approx(3 * (cost.gb_seconds or 0.0))
    if cost.gb_seconds:
        assert cost.idle_share == pytest.approx(found["idle"] / (memory + found["idle"]), abs=1e-9)


def test_who_sheds_or_fails_is_not_cheaper_for_it() -> None:
    work = work_of([*RECORDS, record(1.0, 1.1, outcome="shed"), record(1.0, 2.0, outcome="failed")])
    assert (work.answered, work.let_in, work.output_tokens, work.good) == (3, 4, 30, None)
    nothing = [record(1.0, 1.1, outcome="shed")]
    cost = lifetimes(SAMPLES, nothing)
    assert cost.total > 0 and cost.per_1k_requests is None and cost.per_1m_output_tokens is None
    assert cost.effectiveness is None


# --- the server's ledger


def books(*, device: str = "cpu", finished: int = 3) -> Ledger:
    """As a server of ours really sends it."""
    used = UsageRow(
        "a",
        requests=finished + 1,
        finished=finished,
        refused=1,
        device_s=4.0,
        device_s_of={device: 4.0},
        byte_s={"host": 28.0 * GB, "device": 1.0 * GB},
    )
    idle = UsageRow(None, idle=True, byte_s={"host": 10.0 * GB})
    report = report_usage([used, idle], read_server_prices(), by="function", since=5.0)
    return msgspec.json.decode(msgspec.json.encode(report), type=Ledger)


def test_the_ledgers_quantities_are_paid_at_our_prices() -> None:
    cost = ledger_cost(books(device="NVIDIA H200"), prices=PRICES, work=work_of(RECORDS))
    assert parts(cost) == pytest.approx({"memory": 3 * 28 + 11, "compute": 4 * 7, "requests": 0.5 * 3, "idle": 3 * 10})
    assert cost.total == pytest.approx(sum(parts(cost).values()))
    assert cost.idle_share == pytest.approx(10 / 39)
    assert cost.gb_seconds == pytest.approx(39) and cost.device_seconds == 4.0


# --- baselines


def instance(size_bytes: int = 6 * GB) -> Instance:
    return Instance(4 * GB, size_bytes - 4 * GB, "by hand")


def test_an_instance_is_a_backbone_and_the_least_that_was_seen_per_worker() -> None:
    assert instance_of([]) is None
    assert instance_of([Sample(0.0, 2, GB, {"other": GB})]) is None
    samples = [
        Sample(0.0, 0, GB, {"backbone": GB, "workers": 7}),
        Sample(1.0, 2, GB, {"backbone": 2 * GB, "workers": 100, "adapters": 40, "kv": 60, "other": 999}),
        Sample(2.0, 1, GB, {"backbone": 2 * GB, "workers": 300}),
    ]
    found = instance_of(samples)
    assert found is not None and (found.backbone_bytes, found.own_bytes) == (2 * GB, 100)


REQUESTS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 30), st.sampled_from("abc"), st.sampled_from(["ok", "shed"])),
    min_size=1,
    max_size=10,
)


@given(requests=REQUESTS, keep_alive=st.integers(0, 40))
def test_instances_live_as_if_followed_second_by_second(
    requests: list[tuple[int, int, str, str]], keep_alive: int
) -> None:
    records = [record(begin, begin + each, model, outcome=outcome) for begin, each, model, outcome in requests]
    took = sorted(each for _, each, _, outcome in requests if outcome == "ok")
    median = (took[(len(took) - 1) // 2] + took[len(took) // 2]) / 2 if took else 0
    seconds, step = 60, 2  # half seconds: a median may be one
    alive = busy = 0
    for model in {model for _, _, model, _ in requests}:
        mine = [(b, e if o == "ok" else median) for b, e, m, o in requests if m == model]
        for at in range(seconds * step):
            busy += any(b * step <= at < (b + e) * step for b, e in mine)
            alive += any(b * step <= at < (b + e + keep_alive) * step for b, e in mine if e + keep_alive)
    found = kept_alive(records, seconds, keep_alive)
    assert found.alive_s == pytest.approx(alive / step)
    assert found.busy_s == pytest.approx(busy / step)
    models = len({model for _, _, model, _ in requests})
    assert always_on(records, seconds) == pytest.approx((models * seconds, busy / step))
    assert always_on(records, seconds, adapters=9).alive_s == 9 * seconds
    assert found.busy_s <= found.alive_s <= always_on(records, seconds).alive_s


def test_a_baseline_pays_for_whole_models_and_for_the_same_work() -> None:
    cost = baseline_cost(
        "always on",
        "one each",
        always_on(RECORDS, 10.0),
        instance(),
        device_s=3.0,
        device=None,
        prices=PRICES,
        work=work_of_all(work_of(RECORDS), RECORDS),
    )
    # a: [0, 3) and, unsent, [5, 7) (the median is 2 s); b: [2, 4) and [8, 9). 8 of 20 instance seconds.
    assert parts(cost) == pytest.approx(
        {"backbone": 3 * 4 * 8, "workers": 3 * 2 * 8, "compute": 6, "requests": 2.0, "idle": 3 * 6 * 12}
    )
    assert cost.gb_seconds == pytest.approx(120) and cost.idle_share == pytest.approx(0.6)
    assert cost.effectiveness == pytest.approx(1 / (2.0 * cost.total))  # mean E2E of all answers: nobody said "warm"


def test_the_failures_of_the_measured_server_make_no_baseline_dearer() -> None:
    """A baseline answers all requests, so whatever is divided by answers is divided by all."""
    half = [*RECORDS, *(record(1.0, 1.1, outcome="shed") for _ in range(4))]
    work = work_of(half, good=2)
    everything = work_of_all(work, half)
    assert (everything.answered, everything.let_in, everything.good) == (8, 8, 8)
    assert everything.output_tokens == 80  # 30 of 3 answers
    assert device_s_of_all(6.0, work, half) == pytest.approx(6.0 * 8 / 3)
    money = account(prices=PRICES, records=half, seconds=10.0, samples=SAMPLES, good=2, instance=instance())
    for cost in money.baselines:
        assert cost.per_1k_requests == pytest.approx(cost.total / 0.008)
        assert cost.per_good_request == pytest.approx(cost.total / 8)
        assert cost.per_1m_output_tokens == pytest.approx(cost.total / 80e-6)
        assert parts(cost)["requests"] == pytest.approx(0.5 * 8)
        assert parts(cost)["compute"] == pytest.approx(2 * 3.0 * 8 / 3)
    nothing = [record(1.0, 1.1, outcome="shed")]
    none = work_of_all(work_of(nothing), nothing)
    assert (none.answered, none.output_tokens, none.good) == (1, 0, None)
    assert device_s_of_all(0.0, work_of(nothing), nothing) == 0.0


def test_a_baseline_is_as_fast_as_what_met_nothing_cold() -> None:
    told = [
        msgspec.structs.replace(each, cold=kind) for each, kind in zip(RECORDS, ("worker", *3 * ["warm"]), strict=True)
    ]
    assert work_of(told).mean_e2e_s == pytest.approx(2.0)
    assert work_of_all(work_of(told), told).mean_e2e_s == pytest.approx(1.5)  # of 2 and 1 s
    money = account(prices=PRICES, records=told, seconds=10.0, samples=SAMPLES)
    assert len(money.baselines) == 2
    for cost in money.baselines:
        assert cost.effectiveness == pytest.approx(1 / (1.5 * cost.total))


def test_memory_on_a_device_is_not_sold_as_the_hosts() -> None:
    """16 GB on an H200 for 100 s."""
    records = [record(0.0, 100.0)]
    parts_of = {"backbone": 16 * GB, "workers": 2 * GB}
    samples = [Sample(at, 1, 18 * GB, parts_of) for at in (0.0, 100.0)]
    more: dict[str, Any] = {"prices": read_prices(), "records": records, "seconds": 100.0, "samples": samples}
    money = account(device="NVIDIA H200", **more)
    assert money.measured == money.baselines == []
    assert any("NVIDIA H200" in note and "--instance-gb" in note for note in money.notes)
    money = account(device="NVIDIA H200", instance=Instance(16 * GB, 0, "as told"), **more)
    on = money.baselines[0]
    assert money.measured == []
    assert parts(on)["backbone"] == pytest.approx(16 * 100 * read_prices().gb_second.device) == pytest.approx(0.0224)
    assert parts(on)["compute"] == pytest.approx(100 * 0.0014) and "device memory" in on.how
    on = account(device="cpu", **more).baselines[0]
    assert parts(on)["backbone"] == pytest.approx(16 * 100 * read_prices().gb_second.host) and "host memory" in on.how
    notes = " ".join(account(**more).notes)
    assert "Nobody said what the server computes on" in notes
    assert "Nobody said" not in " ".join(account(device="cpu", **more).notes)


def test_what_idle_means_is_said_of_every_row() -> None:
    money = whole()
    assert len({cost.how.partition("idle: ")[2].partition(";")[0] for cost in (*money.measured, *money.baselines)}) == 3
    assert all("idle: " in cost.how for cost in (*money.measured, *money.baselines))
    assert any("Idle does not mean the same" in note for note in money.notes)


# --- together


def whole(**more: Any) -> Money:
    settings: dict[str, Any] = {"samples": SAMPLES, "ledger": books(), "good": 2, **more}
    return account(prices=settings.pop("prices", PRICES), records=RECORDS, seconds=10.0, **settings)


def test_an_account_has_both_measures_their_difference_and_both_baselines() -> None:
    money = whole(keep_alive_s=4.0, speedup=4.0)
    assert [cost.name for cost in money.measured] == ["ledger", "lifetimes"]
    ledger, seen = money.measured
    assert money.difference == pytest.approx((ledger.total - seen.total) / seen.total)
    assert [cost.name for cost in money.baselines] == ["always on", "keep-alive 4 s (1 s at x4)"]
    on, kept = money.baselines
    # a: [0, 3) and [5, 7), b: [2, 4) and [8, 9), each and 1 s more. 2 GB of backbone, at least 0.5 per worker.
    assert kept.gb_seconds == pytest.approx((4 + 3 + 3 + 2) * 2.5)
    assert on.gb_seconds == pytest.approx(20 * 2.5)
    assert seen.device_seconds == 3.0 and on.device_seconds == pytest.approx(4.0)  # 3 requests were let in, 4 sent
    assert any("compressed by 4" in note for note in money.notes)
    # 15 worker seconds, 20 and 12 instance seconds, 2 EUR each.
    assert "measured 30 EUR, always on 40 EUR, keep-alive 4 s (1 s at x4) 24 EUR" in money.notes[-1]
    assert msgspec.json.decode(msgspec.json.encode(money), type=Money) == money


def test_illustrative_prices_are_told_wherever_money_is() -> None:
    money = whole(prices=read_prices())
    assert money.prices["illustrative"] is True and money.prices["date"] == "2026-11-01"
    for cost in (*money.measured, *money.baselines):
        assert "illustrative" in cost.how
    assert "nobody's offer" in " ".join(money.notes)
    assert all("illustrative" in note for note in money.notes if "USD" in note)
    honest = whole()
    assert not any("illustrative" in cost.how for cost in (*honest.measured, *honest.baselines))
    assert "nobody's offer" not in " ".join(honest.notes)


def test_what_makes_an_account_doubtful_is_said() -> None:
    notes = " ".join(whole(ledger=books(finished=5)).notes)
    assert "5 finished requests" in notes and "3 whole answers to 3 requests" in notes
    assert "2 finished requests" in " ".join(whole(ledger=books(finished=2)).notes)
    assert "By its own illustrative prices of 2026-11-01 the server says" in notes
    assert "finished requests" not in " ".join(whole().notes)
    assert "By its own" not in " ".join(whole(prices=read_prices()).notes)
    assert "differ by" not in " ".join(whole(ledger=None).notes)
    problem = msgspec.structs.replace(books(), problem="the disk is full")
    assert "the disk is full" in " ".join(whole(ledger=problem).notes)


def test_without_any_look_at_the_server_there_are_baselines_only_for_a_known_model() -> None:
    money = whole(samples=(), ledger=None)
    assert (money.measured, money.baselines, money.difference) == ([], [], None)
    assert any("--instance-gb" in note for note in money.notes)
    money = whole(samples=(), ledger=None, instance=instance())
    assert [cost.device_seconds for cost in money.baselines] == pytest.approx([5.0 * 4 / 3] * 2)
    assert not any("As the paper counts" in note for note in money.notes)


def test_timers_are_named_as_they_are_and_as_they_act() -> None:
    assert keep_alive_name(600.0, 1.0) == "keep-alive 10 min"
    assert keep_alive_name(600.0, 10.0) == "keep-alive 10 min (60 s at x10)"
