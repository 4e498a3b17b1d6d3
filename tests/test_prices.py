"""Price files are strict, money is linear, and the two totals stay apart."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.errors import ConfigError
from serverlesslora.metering.export import neutralised, report_requests, report_usage, to_csv
from serverlesslora.metering.prices import (
    Money,
    Prices,
    TokenPrices,
    alive_cost,
    cost_effectiveness,
    counted,
    read_prices,
)
from serverlesslora.metering.usage import RequestPage, RequestUsage, Residency, UsageRow

GOOD = """
date = 2026-11-01
source = "our contract"
currency = "EUR"

[device_second]
default = 0.5
H100 = 2
"H100 PCIe" = 1.5

[gb_second]
host = 0.25
device = 4.0

[tokens]
prompt = 1.0
output = 3.0
cached = 0.125
"""
USAGE = RequestUsage(
    request_id="r",
    function="f",
    tenant=None,
    domain="d",
    backbone="b",
    digest=None,
    started_at=0.0,
    prompt_tokens=3000,
    cached_tokens=1000,
    completion_tokens=500,
    device_s=4.0,
    queue_s=0.0,
    ttft_s=None,
    duration_s=1.0,
    rung="hot",
    status="finished",
    slo_missed=False,
)


def read(tmp_path: Path, text: str) -> Prices:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    return read_prices(path)


@pytest.fixture
def prices(tmp_path: Path) -> Prices:
    return read(tmp_path, GOOD)


def test_a_request_has_two_totals(prices: Prices) -> None:
    money = prices.request_money(USAGE)
    assert money == Money(device=2.0, holding=0.0, charged=2 * 1.0 + 1 * 0.125 + 0.5 * 3, paid=2.0)
    assert prices.request_cost(USAGE) == money.charged
    assert prices.request_money(USAGE, device="NVIDIA h100 80GB").paid == 8
    assert (
        prices.request_money(msgspec.structs.replace(USAGE, device="x"), device="H100").paid == 2
    )  # its own name wins
    without = msgspec.structs.replace(prices, tokens=None)
    assert without.request_money(USAGE).charged is None
    assert without.request_cost(USAGE) == 2.0
    assert counted(Money(device=1, holding=7, paid=8)) == 1


def test_cached_tokens_cost_as_others_unless_priced(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD.replace("cached = 0.125", "")).request_cost(USAGE) == 3 * 1.0 + 0.5 * 3
    assert read(tmp_path, GOOD.replace("cached = 0.125", "cached = 0")).request_cost(USAGE) == 2 * 1.0 + 0.5 * 3


def test_the_longest_fitting_name_prices_a_device(prices: Prices) -> None:
    names = {"NVIDIA H100 80GB HBM3": 2, "NVIDIA H100 PCIe": 1.5, "cpu": 0.5, "the default H10": 0.5, None: 0.5}
    assert {name: prices.device_price(name) for name in names} == names


def test_memory_is_priced_by_tier(prices: Prices) -> None:
    residency = Residency("a", "backbone", None, None, None, 2 * 10**9, 10.0, 0.0)
    assert prices.holding_cost(residency) == 20 * 0.25
    assert prices.holding_cost(msgspec.structs.replace(residency, tier="device")) == 20 * 4
    row = UsageRow("f", device_s_of={"H100": 1.0, "default": 2.0}, byte_s={"host": 1e9, "device": 2e9})
    assert prices.row_money(row) == Money(device=3.0, holding=8.25, charged=0.0, paid=11.25)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1e6))
def test_prices_are_linear_and_never_negative(prompt: int, cached: int, output: int, device_s: float) -> None:
    prices = msgspec.structs.replace(read_prices(), tokens=TokenPrices(1, 2, 0))
    usage = msgspec.structs.replace(
        USAGE, prompt_tokens=prompt + cached, cached_tokens=cached, completion_tokens=output, device_s=device_s
    )
    one = prices.request_money(usage)
    row = UsageRow(
        "f",
        prompt_tokens=2 * (prompt + cached),
        cached_tokens=2 * cached,
        completion_tokens=2 * output,
        device_s_of={"default": 2 * device_s},
    )
    two = prices.row_money(row)
    assert one.charged is not None and two.charged is not None
    assert one.paid >= 0 and one.charged >= 0
    assert two.paid == pytest.approx(2 * one.paid)
    assert two.charged == pytest.approx(2 * one.charged)


def test_the_formulas_of_the_paper() -> None:
    assert alive_cost([(10, 0.5), (2, 3.0)]) == 11
    assert cost_effectiveness(2.0, 0.25) == 2
    assert cost_effectiveness(2.0, 0.0) == math.inf


def test_the_built_in_table_says_what_it_is() -> None:
    built_in = read_prices()
    assert built_in.illustrative
    assert built_in.tokens is None
    assert 0 < built_in.device_price("cpu") < built_in.device_price("NVIDIA H100 80GB HBM3")
    assert built_in.gb_second.host < built_in.gb_second.device


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("date = 2026-11-01", "", "date"),
        ("date = 2026-11-01", 'date = "soon"', "$.date"),
        ('source = "our contract"', 'source = ""', "$.source"),
        ('"EUR"', '"euros"', "$.currency"),
        ("default = 0.5", "", "default"),
        ("default = 0.5", "default = -1", "device_second.default"),
        ("default = 0.5", 'default = "0.5"', "$.device_second"),
        ("H100 = 2", "H100 = nan", "device_second.H100"),
        ("H100 = 2", "H100 = inf", "device_second.H100"),
        ("host = 0.25", "", "host"),
        ("device = 4.0", "device = inf", "gb_second.device"),
        ("[gb_second]", "[gb_second]\ndisk = 1", "disk"),
        ("output = 3.0", "ouput = 3.0", "ouput"),
        ("prompt = 1.0", "prompt = inf", "tokens.prompt"),
        ('currency = "EUR"', 'currency = "EUR"\nprise = 1', "prise"),
        ("[device_second]", "[device_second", "TOML"),
    ],
)
def test_a_wrong_price_file_names_the_field(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert GOOD.count(old) >= 1
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert named in caught.value.message
    assert "prices.toml" in caught.value.message


def test_a_missing_price_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.toml"):
        read_prices(tmp_path / "nowhere.toml")


# -- export --

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\rx", "\n=cmd()", "＝1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_a_formula(prices: Prices, text: str) -> None:
    page = RequestPage((msgspec.structs.replace(USAGE, function=text, tenant=text, request_id=text, queue_s=-1.0),))
    cells = table(to_csv(report_requests(page, prices)))[0]
    assert cells["function"] == cells["tenant"] == cells["request_id"] == f"'{text}"
    assert cells["queue_s"] == "-1.0"  # a number is a number
    assert table(to_csv(report_usage([UsageRow(text)], prices, by="tenant")))[0]["tenant"] == f"'{text}"


@given(st.text(max_size=8))
def test_other_text_stays_as_it_is(text: str) -> None:
    assert neutralised(text) in (text, f"'{text}")
    assert neutralised(text)[:1] not in tuple("=+-@\t\r")
    if text[:1].isalnum():
        assert neutralised(text) == text


def table(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_carries_what_json_carries(prices: Prices) -> None:
    rows = [
        UsageRow(
            "f", requests=2, prompt_tokens=5, device_s_of={"cpu": 2.0}, device_s=2.0, rungs={"hot": 1, "worker": 1}
        ),
        UsageRow(None, True, byte_s={"host": 1e9, "device": 2e9}),
        UsageRow(None),
    ]
    report = report_usage(rows, prices, by="function", limit=2)
    assert [row.usage.idle for row in report.rows] == [True, False]  # what costs most comes first
    assert report.has_more and report.total.money.paid == 1 + 8.25
    idle, f = table(to_csv(report))
    assert (f["function"], f["requests"], f["rungs"], f["paid"], f["currency"]) == (
        "f",
        "2",
        "hot=1 worker=1",
        "1.0",
        "EUR",
    )
    assert (idle["function"], idle["idle"], idle["host_byte_s"], idle["paid_holding"]) == (
        "",
        "True",
        "1000000000.0",
        "8.25",
    )
    assert {f["prices_of"], f["illustrative_prices"]} == {"2026-11-01", "False"}
    assert to_csv(report, header=False).count("\n") == 2
