"""Made-up workloads are what they were told to be, and the same wherever they are made."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from serverlesslora_loadgen.classes import CLASSES, MIN_ARRIVALS, adapter_facts, class_of, cv
from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.generate.arrivals import (
    Arrivals,
    Constant,
    Gamma,
    OnOff,
    Poisson,
    Times,
    Weibull,
    parse_arrivals,
)
from serverlesslora_loadgen.generate.diurnal import CourseFile, Flat, Sine, parse_diurnal
from serverlesslora_loadgen.generate.popularity import (
    Geometric,
    Popularity,
    Power,
    Uniform,
    Weights,
    Zipf,
    counts,
    parse_popularity,
)
from serverlesslora_loadgen.generate.workload import (
    ArrivalClass,
    Workload,
    generate,
    parse_classes,
    read_workload,
)
from serverlesslora_loadgen.trace import TraceRequest, digest, encode

ROOT = Path(__file__).parents[1]
MIXED = """
adapters = 12
rate_rps = 1.0
duration_s = 3600
popularity = { kind = "zipf", s = 0.9 }
lengths = { kind = "lognormal", input = { mean = 900, sigma = 0.8 }, output = { mean = 120, sigma = 1.0, max = 600 } }
diurnal = { kind = "sine", period_s = 1800, depth = 0.3 }
seed = 7

[[classes]]
name = "Predictable"
arrivals = { kind = "gamma", cv = 0.5 }

[[classes]]
name = "Normal"
arrivals = { kind = "gamma", cv = 2.0 }

[[classes]]
name = "Bursty"
arrivals = { kind = "onoff", on_s = 20, cv = 7 }
"""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def times_of(requests: list[TraceRequest], model: str) -> list[float]:
    return [each.timestamp / 1000 for each in requests if each.model == model]


# --- the whole


def test_the_same_seed_makes_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(MIXED)
    code = (
        "import sys; from pathlib import Path; from serverlesslora_loadgen.generate.workload import *;"
        "from serverlesslora_loadgen.trace import encode;"
        "sys.stdout.buffer.write(b''.join(encode(generate(read_workload(Path(sys.argv[1]))))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "loadgen")}
    made = [
        subprocess.run(
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            check=True,
            env={**environment, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1] == b"".join(encode(generate(read_workload(path))))
    assert len(made[0].splitlines()) == 3600


def test_another_seed_changes_when_but_not_how_many() -> None:
    one, other = (generate(Workload(adapters=6, rate_rps=2, duration_s=300, seed=seed)) for seed in (1, 2))
    assert len(one) == len(other) == 600
    assert digest(one) != digest(other)


@settings(max_examples=30)
@given(
    adapters=st.integers(1, 12),
    rate=st.floats(0.05, 5),
    duration=st.floats(10, 600),
    popularity=st.sampled_from([Uniform(), Power(0.3), Zipf(1.1), Geometric(1.5)]),
    arrivals=st.sampled_from([Poisson(), Gamma(3), Weibull(0.6), OnOff(10, off_s=100), OnOff(5, cv=4), Constant()]),
    diurnal=st.sampled_from([Flat(), Sine(60, 0.8)]),
    seed=st.integers(0, 99),
)
def test_every_trace_is_in_order_and_in_time_and_as_large_as_asked(
    adapters: int,
    rate: float,
    duration: float,
    popularity: Popularity,
    arrivals: Arrivals,
    diurnal: Flat | Sine,
    seed: int,
) -> None:
    assume(round(rate * duration) >= 1)
    requests = generate(
        Workload(
            adapters=adapters,
            rate_rps=rate,
            duration_s=duration,
            popularity=popularity,
            arrivals=arrivals,
            diurnal=diurnal,
            seed=seed,
        )
    )
    total = round(rate * duration)
    assert len(requests) == total
    times = [each.timestamp for each in requests]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 1000 * duration + 0.001
    found = Counter(each.model for each in requests)
    for i, share in enumerate(popularity.shares(adapters)):
        assert abs(found[f"adapter-{i:02d}"] - share * total) < 1 + 1e-6


def test_a_span_too_short_for_the_silences_of_a_law_is_one_burst_and_no_error() -> None:
    law = OnOff(10, off_s=100)
    assert law.parts(432, 108) < 1
    found = [
        cv(times_of(generate(Workload(adapters=1, rate_rps=4, duration_s=108, arrivals=law, seed=seed)), "adapter-00"))
        for seed in range(10)
    ]
    assert min(each for each in found if each is not None) < 1.2 < law.moments(4).cv


def test_an_adapter_does_not_hang_on_how_many_others_there_are() -> None:
    few = Workload(adapters=3, rate_rps=3, duration_s=100, popularity=Uniform(), arrivals=Gamma(2))
    many = Workload(adapters=5, rate_rps=5, duration_s=100, popularity=Uniform(), arrivals=Gamma(2))
    for name in ("adapter-00", "adapter-02"):
        assert times_of(generate(few), name) == times_of(generate(many), name)
    assert times_of(generate(few), "adapter-00") != times_of(generate(few), "adapter-01")


# --- classes


def test_a_mixed_workload_has_a_third_of_each_class_by_its_own_times(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(MIXED)
    requests = generate(read_workload(path))
    told = {each.model: each.class_ for each in requests}
    facts = adapter_facts(requests)
    assert Counter(each.class_ for each in facts) == dict.fromkeys(CLASSES, 4)
    assert all(told[each.model] == each.class_ for each in facts)
    assert [told[f"adapter-{i:02d}"] for i in range(4)] == ["Predictable", "Normal", "Bursty", "Predictable"]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_can_be_made_by_its_name_alone(name: str) -> None:
    for seed in range(3):
        workload = Workload(adapters=12, rate_rps=1, duration_s=1800, classes=parse_classes(name), seed=seed)
        facts = adapter_facts(generate(workload))
        assert {each.class_ for each in facts} == {name}
        assert all(each.cv is not None and class_of(each.cv) == name for each in facts)


@settings(max_examples=15)
@given(seed=st.integers(0, 50), adapters=st.integers(20, 120), rate=st.sampled_from([0.5, 1, 2]))
def test_a_long_tail_has_no_class_that_its_times_deny(seed: int, adapters: int, rate: float) -> None:
    requests = generate(
        Workload(adapters=adapters, rate_rps=rate, duration_s=1800, classes=parse_classes("mixed"), seed=seed)
    )
    told = {each.model: each.class_ for each in requests}
    asked = {f"adapter-{i:02d}": CLASSES[i % 3] for i in range(adapters)}
    for each in adapter_facts(requests):
        assert told[each.model] == each.class_
        assert (each.class_ is None) == (each.n < MIN_ARRIVALS)
        if each.n >= MIN_ARRIVALS and (asked[each.model] != "Bursty" or each.n > 18):  # √(18 - 2) is no more than 4
            assert each.class_ == asked[each.model]


def test_classes_are_dealt_out_by_weight() -> None:
    classes = (ArrivalClass("rare", Poisson(), 1 / 3), ArrivalClass("often", Poisson(), 2 / 3))
    workload = Workload(adapters=9, rate_rps=9, duration_s=20, popularity=Uniform(), classes=classes)
    told = {each.model: each.class_ for each in generate(workload)}
    assert Counter(told.values()) == {"often": 6, "rare": 3}


def test_adapters_without_a_named_class_get_the_one_they_have() -> None:
    requests = generate(Workload(adapters=4, rate_rps=1, duration_s=600, arrivals=Gamma(0.3), popularity=Zipf(4)))
    told = {each.model: each.class_ for each in requests}
    for each in adapter_facts(requests):
        assert told[each.model] == each.class_
    assert None in told.values()  # too few requests
    assert "Predictable" in told.values()


def test_a_class_that_cannot_be_had_is_refused_with_the_numbers() -> None:
    classes = (ArrivalClass("Bursty", Gamma(0.5)),)
    with pytest.raises(WorkloadError, match=r"adapter-00 was to be Bursty.* 300 requests .*CV was 0\.\d\d to 0\.\d\d"):
        generate(Workload(adapters=1, rate_rps=1, duration_s=300, classes=classes))


def test_a_process_that_is_not_what_was_asked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisson(_: Gamma, rng: np.random.Generator, n: int, span_s: float) -> Times:
        return Poisson().times(rng, n, span_s)

    monkeypatch.setattr(Gamma, "times", poisson)
    with pytest.raises(WorkloadError, match=r"adapter-00 was to have a CV of 4\.00 .* has 1\.\d+ in its 2000 requests"):
        generate(Workload(adapters=1, rate_rps=2, duration_s=1000, arrivals=Gamma(4)))


# --- popularity


def test_power_is_the_formula_of_s_lora() -> None:
    alpha, n = 0.3, 10
    expected = [((i + 1) ** alpha - i**alpha) / n**alpha for i in range(n)]
    assert Power(alpha).shares(n) == pytest.approx(expected)
    assert Power(alpha).shares(n)[0] == pytest.approx(n**-alpha)
    assert Power(1).shares(4) == pytest.approx([0.25] * 4)


@given(n=st.integers(1, 200), law=st.sampled_from([Uniform(), Power(0.1), Zipf(0), Zipf(2), Geometric(1.5)]))
def test_shares_sum_to_one_and_fall(n: int, law: Popularity) -> None:
    shares = law.shares(n)
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 1e-12).all()


def test_ratios_of_zipf_and_geometric() -> None:
    assert Zipf(2).shares(3) == pytest.approx(np.array([1, 1 / 4, 1 / 9]) / (1 + 1 / 4 + 1 / 9))
    assert Geometric(2).shares(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])


@given(weights=st.lists(st.floats(0, 100), min_size=1, max_size=50), total=st.integers(1, 10_000), seed=st.integers(0))
def test_counts_are_shares_rounded(weights: list[float], total: int, seed: int) -> None:
    assume(sum(weights) > 1e-3)
    shares = np.array(weights) / sum(weights)
    found = counts(shares, total, rng(seed))
    assert found.sum() == total
    assert (np.abs(found - shares * total) < 1 + 1e-6).all()


def test_rounding_favours_no_adapter() -> None:
    shares = np.full(10, 0.1)
    mean = np.mean([counts(shares, 3, rng(seed)) for seed in range(2000)], axis=0)
    assert mean == pytest.approx([0.3] * 10, abs=0.06)  # six standard errors


def test_a_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_text("# requests a day\n30\n\n10\n")
    assert Weights(str(path)).shares(2) == pytest.approx([0.75, 0.25])
    with pytest.raises(WorkloadError, match="2 weights for 3 adapters"):
        Weights(str(path)).shares(3)
    for text, message in (("1\nx\n", ":2: 'x' is not"), ("1\n-1\n", ":2: -1.0 is not"), ("0\n", "at least one")):
        path.write_text(text)
        with pytest.raises(WorkloadError, match=message):
            Weights(str(path)).shares(2)
    with pytest.raises(WorkloadError, match="cannot read"):
        Weights(str(tmp_path / "none")).shares(2)


# --- arrivals

LAWS = [Poisson(), Gamma(0.4), Gamma(3), Weibull(0.6), Weibull(3), OnOff(30, off_s=300), OnOff(30, cv=5)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_gaps_vary_as_the_law_says(law: Arrivals) -> None:
    n, span_s = 20_000, 200_000.0
    times = law.times(rng(3), n, span_s)
    moments = law.moments(n / span_s)
    assert moments.m1 == pytest.approx(span_s / n)
    found = cv(times)
    assert found is not None
    assert abs(np.log(found / moments.cv)) < 4 * moments.cv_error(n - 1)
    assert moments.cv_error(n - 1) < 0.03  # so that the line above says something


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_error_of_a_cv_is_as_large_as_its_formula_says(law: Arrivals) -> None:
    n, span_s = 800, 8000.0
    found = [each for seed in range(150) if (each := cv(law.times(rng(seed), n, span_s))) is not None]
    relative = float(np.std(found) / np.mean(found))
    # Within the error of a standard deviation of 150, and of a formula for many gaps.
    assert relative == pytest.approx(law.moments(n / span_s).cv_error(n - 1), rel=0.45)


def test_named_coefficients_are_those_of_the_moments() -> None:
    assert Poisson().moments(0.3).cv == pytest.approx(1)
    assert Gamma(2.5).moments(0.3).cv == pytest.approx(2.5)
    assert OnOff(30, cv=5).moments(0.3).cv == pytest.approx(5)
    assert Weibull(1).moments(0.3).cv == pytest.approx(1)
    assert Constant().moments(0.3).cv == 0


def test_on_and_off_follow_a_plain_simulation() -> None:
    """Step by step: a source that is on or off, and asks at a steady rate while it is on."""
    on_s, off_s, rate = 5.0, 45.0, 0.4
    random = rng(5)
    at = 0.0
    times: list[float] = []
    while len(times) < 30_000:
        end = at + random.exponential(on_s)
        while (at := at + random.exponential(on_s / (rate * (on_s + off_s)))) < end:
            times.append(at)
        at = end + random.exponential(off_s)
    law = OnOff(on_s, off_s=off_s)
    simulated = cv(times)
    assert simulated == pytest.approx(law.moments(rate).cv, rel=0.05)
    assert cv(law.times(rng(6), 30_000, 30_000 / rate)) == pytest.approx(simulated, rel=0.1)


@settings(max_examples=60)
@given(
    law=st.sampled_from([*LAWS, Constant(), Gamma(100), OnOff(0.01, off_s=1e8), OnOff(1e8, off_s=0.1)]),
    n=st.integers(0, 60),
    span_s=st.floats(0.01, 1e5),
    seed=st.integers(0, 1000),
)
def test_times_are_n_ascending_and_inside(law: Arrivals, n: int, span_s: float, seed: int) -> None:
    assume(not (isinstance(law, OnOff) and span_s > 1000 and law.on_s < 1 and law.off_s is not None and law.off_s < 1))
    times = law.times(rng(seed), n, span_s)
    assert len(times) == n
    assert (np.diff(times) >= 0).all()
    assert n == 0 or (times[0] >= 0 and times[-1] <= span_s * (1 + 1e-12))


def test_constant_gaps_are_equal_and_do_not_begin_together() -> None:
    times = Constant().times(rng(1), 20, 100.0)
    assert np.diff(times) == pytest.approx([5.0] * 19)
    assert 0 <= times[0] < 5
    assert times[0] != Constant().times(rng(2), 20, 100.0)[0]


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("poisson", Poisson()),
        ("gamma:cv=4", Gamma(4)),
        ("gamma:4", Gamma(4)),
        ("weibull:0.7", Weibull(0.7)),
        ("onoff:on=30,off=10m", OnOff(30, off_s=600)),
        ("onoff:on_s=30,cv=6", OnOff(30, cv=6)),
        ("constant", Constant()),
    ],
)
def test_arrivals_are_read(text: str, law: Arrivals) -> None:
    assert parse_arrivals(text) == law


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama:4", "'gama' is none of them; there are poisson, gamma:cv=…"),
        ("gamma", "missing required field `cv`"),
        ("gamma:1,2", "one value too many"),
        ("gamma:shape=2", "unknown field `shape`"),
        ("gamma:nan", "Expected `float` > 0"),
        ("gamma:x", "Expected `float`"),
        ("weibull:0", "Expected `float` >= 0.2"),
        ("onoff:30", "either off_s or cv"),
        ("onoff:on=30,off=5,cv=3", "either off_s or cv"),
        ("onoff:on=soon,off=5", "'soon' is not a time"),
    ],
)
def test_arrivals_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        parse_arrivals(text)
    assert message in str(caught.value)


def test_the_other_laws_are_read() -> None:
    assert parse_popularity("zipf:1.1") == Zipf(1.1)
    assert parse_popularity("power:alpha=0.5") == Power(0.5)
    assert parse_popularity("geometric:1.5") == Geometric(1.5)
    assert parse_popularity("uniform") == Uniform()
    assert parse_popularity("file:a.txt") == Weights("a.txt")
    assert parse_diurnal("none") == Flat()
    assert parse_diurnal("sine:1h,0.5") == Sine(3600, 0.5)
    assert parse_diurnal("file:a.csv,period=1h") == CourseFile("a.csv", 3600)
    assert [each.name for each in parse_classes("mixed")] == list(CLASSES)
    assert parse_classes("bursty=onoff:on=5,cv=6;tenants=poisson") == (
        ArrivalClass("Bursty", OnOff(5, cv=6)),
        ArrivalClass("tenants", Poisson()),
    )
    for parse, text in ((parse_popularity, "power:2"), (parse_diurnal, "sine:1h,1.5"), (parse_classes, "tenants")):
        with pytest.raises(WorkloadError):
            parse(text)


# --- the course of the day


@pytest.mark.parametrize("law", [Flat(), Sine(100, 0), Sine(100, 0.6), Sine(77, 1), Sine(1000, 0.9)])
def test_the_clock_and_the_steady_time_are_each_others_inverse(law: Flat | Sine) -> None:
    course = law.course(250.0)
    steady = np.linspace(0, 250, 1001)
    assert course.to_steady(course.to_clock(steady)) == pytest.approx(steady)
    assert course.to_clock(steady)[[0, -1]] == pytest.approx([0, 250])


def test_a_sine_has_its_depth() -> None:
    requests = generate(
        Workload(adapters=1, rate_rps=100, duration_s=100, arrivals=Constant(), diurnal=Sine(period_s=100, depth=0.5))
    )
    # The integral of 1 + 0.5 sin over half a period is 50 + 100/(2π).
    first = sum(each.timestamp < 50_000 for each in requests)
    assert first == pytest.approx(100 * (50 + 100 / (2 * np.pi)), abs=3)


def test_a_course_from_a_file_repeats_and_is_squeezed(tmp_path: Path) -> None:
    path = tmp_path / "hours.csv.gz"
    path.write_bytes(gzip.compress(b"time_bin_s,requests,sessions\n3600,300,1\n7200,0,1\n10800,100,1\n"))

    def parts(period_s: float | None, duration_s: float, step_s: float) -> list[int]:
        workload = Workload(
            adapters=1,
            rate_rps=1000 / duration_s,
            duration_s=duration_s,
            arrivals=Constant(),
            diurnal=CourseFile(str(path), period_s),
        )
        steps = [int(each.timestamp / 1000 / step_s) for each in generate(workload)]
        return [steps.count(step) for step in range(round(duration_s / step_s))]

    assert parts(None, 3 * 3600, 3600) == pytest.approx([750, 0, 250], abs=2)
    assert parts(60, 120, 20) == pytest.approx([375, 0, 125, 375, 0, 125], abs=2)
    assert parts(60, 80, 20) == pytest.approx([3000 / 7, 0, 1000 / 7, 3000 / 7], abs=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1\n", "at least 2"),
        ("t,n\n0,1\nx,2\n", "row 3"),
        ("0,1\n0,2\n", "must grow"),
        ("0,1\n1,-2\n", "0 or more"),
        ("0,0\n1,0\n", "not all 0"),
        ("0,nan\n1,1\n", "finite"),
        ("0,0\n1000,1\n", "nothing comes in during the first 10 s"),
    ],
)
def test_courses_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "course.csv"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=message):
        CourseFile(str(path)).course(10.0)


def test_courses_that_cannot_be_read(tmp_path: Path) -> None:
    garbled = tmp_path / "course.gz"
    garbled.write_bytes(gzip.compress(b"0,1\n1,2\n")[:10] + b"\xff" * 20)
    for path in (garbled, tmp_path / "none.csv"):
        with pytest.raises(WorkloadError, match="cannot read the course"):
            CourseFile(str(path)).course(10.0)


def test_the_law_is_checked_without_the_course_of_the_day() -> None:
    """Under a deep sine equal gaps are far from equal on the clock; the law is still recognised in them."""
    requests = generate(
        Workload(adapters=1, rate_rps=1, duration_s=3600, arrivals=Constant(), diurnal=Sine(period_s=600, depth=0.95))
    )
    found = cv(times_of(requests, "adapter-00"))
    assert found is not None and found > 0.5


# --- files


def test_a_workload_file_names_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("3\n1\n")
    (tmp_path / "pairs.csv").write_text("ContextTokens,GeneratedTokens\n11,2\n13,3\n")
    path = tmp_path / "workload.toml"
    path.write_text(
        'adapters = 2\nrate_rps = 4\nduration_s = 10\npopularity = { kind = "file", file = "weights.txt" }\n'
        'lengths = { kind = "empirical", file = "pairs.csv" }\nname = "tenant {}"\n'
    )
    requests = generate(read_workload(path))
    assert Counter(each.model for each in requests) == {"tenant 0": 30, "tenant 1": 10}
    assert {(each.input_length, each.output_length) for each in requests} == {(11, 2), (13, 3)}


GOOD = "adapters = 2\nrate_rps = 1\nduration_s = 10\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters = [", "workload.toml: "),
        ("adapters = 2\n", "missing required field `rate_rps`"),
        ("adapters = 0\nrate_rps = 1\nduration_s = 10\n", r"\$.adapters"),
        ("adapters = 2\nrate_rps = nan\nduration_s = 10\n", r"\$.rate_rps"),
        (GOOD + "speed = 1\n", "unknown field `speed`"),
        (GOOD + 'name = "adapter"\n', "one place for a number"),
        (GOOD + 'name = "{0.x}"\n', "one place for a number"),
        (GOOD + 'popularity = { kind = "pareto" }\n', "pareto"),
        (GOOD + 'classes = [{ name = "tenants" }]\n', "needs `arrivals`"),
        (GOOD + 'arrivals = { kind = "poisson" }\nclasses = [{ name = "Bursty" }]\n', "not both"),
    ],
)
def test_bad_workload_files_name_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "workload.toml"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=message) as caught:
        read_workload(path)
    assert str(path) in str(caught.value)


def test_what_was_put_together_by_hand_is_held_to_the_same_limits() -> None:
    with pytest.raises(WorkloadError, match=r"\$.rate_rps"):
        generate(Workload(adapters=1, rate_rps=-1, duration_s=10))
    with pytest.raises(WorkloadError, match=r"\$.arrivals.cv"):
        generate(Workload(adapters=1, rate_rps=1, duration_s=10, arrivals=Gamma(-2)))
    with pytest.raises(WorkloadError, match="not both"):
        Workload(adapters=1, rate_rps=1, duration_s=10, arrivals=Poisson(), classes=parse_classes("bursty"))
    with pytest.raises(WorkloadError, match="make none in 10 s"):
        generate(Workload(adapters=1, rate_rps=0.01, duration_s=10))
    with pytest.raises(WorkloadError, match="cannot read the workload"):
        read_workload(Path("/none.toml"))
