"""The device's sampler against the host's, row by row: the same token for the same logits, parameters and number."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from serverlesslora.engine import sampler as host
from serverlesslora.engine.counter_rng import uniform
from serverlesslora_ipc.messages import SamplingParams
from serverlesslora_kernels.cuda.sampling import MAX_VOCABULARY, RowParams, sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Row(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    number: float = 0.5


def params_of(rows: Sequence[Row]) -> RowParams:
    columns = [torch.tensor(column, dtype=torch.float64, device=DEVICE) for column in zip(*rows, strict=True)]
    return RowParams(columns[0].float(), columns[1].int(), columns[2], columns[3].float(), columns[4])


def on_device(logits: Tensor, rows: Sequence[Row], *, filtered: bool | None = None) -> list[int]:
    if filtered is None:
        filtered = any(row.top_k or row.top_p < 1 or row.min_p for row in rows)
    greedy = all(row.temperature < host.GREEDY_BELOW for row in rows)
    tokens = sample(logits.to(DEVICE), params_of(rows), greedy_only=greedy, filtered=filtered)
    assert tokens.dtype == torch.long and tokens.shape == (len(rows),)
    return tokens.tolist()


def on_host(logits: Tensor, row: Row, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(host, "uniform", lambda seed, position: row.number)
    params = SamplingParams(temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p)
    [sampled] = host.Sampler().sample(logits[None], [host.SampleRow(params, seed=0, position=0)])
    return sampled.token_id


KINDS = ["normal", "peaked", "flat", "nearly flat", "ties", "holes", "bfloat16"]


def logits_of(kind: str, vocabulary: int, seed: int) -> Tensor:
    noise = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "peaked":
            return noise * 8
        case "flat":
            return torch.full((vocabulary,), 3.0)
        case "nearly flat":
            return noise * 0.2
        case "ties":
            return (noise * 2).round()
        case "holes":
            return torch.where(noise > 0.5, noise, -torch.inf)
        case "bfloat16":
            return (noise * 3).bfloat16().float()
    return noise * 2


def rows_for(count: int, vocabulary: int, seed: int) -> list[Row]:
    pick = random.Random(seed)
    return [
        Row(
            temperature=pick.choice([0.0, 0.3, 0.8, 1.0, 1.0, 2.5]),
            top_k=pick.choice([0, 0, 1, 3, 40, vocabulary, vocabulary + 5]),
            top_p=pick.choice([1.0, 1.0, 0.05, 0.3, 0.9, 0.999, 0.9999999]),
            min_p=pick.choice([0.0, 0.0, 0.01, 0.2, 1.0]),
            number=uniform(seed, index),
        )
        for index in range(count)
    ]


def agreement(logits: Tensor, rows: Sequence[Row], monkeypatch: pytest.MonkeyPatch, *, filtered: bool) -> list[int]:
    """The rows in which the two disagree although the draw is not at the very edge between two tokens."""
    tokens = on_device(logits, rows, filtered=filtered)
    wrong = []
    for index, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        ask = functools.partial(on_host, logits[index], monkeypatch=monkeypatch)
        if token == ask(row):
            continue
        edge = {ask(row._replace(number=min(max(row.number + step, 0.0), 1 - 2.0**-53))) for step in (-1e-6, 1e-6)}
        if token not in edge:
            wrong.append(index)
    return wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "count"), [(5, 60), (260, 120), (32000, 24)])
def test_filtered_rows_are_the_hosts(kind: str, vocabulary: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.stack([logits_of(kind, vocabulary, seed) for seed in range(count)])
    rows = rows_for(count, vocabulary, vocabulary + len(kind))
    assert agreement(logits, rows, monkeypatch, filtered=True) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "count"), [(1, 3), (260, 120), (32000, 24)])
def test_plain_rows_are_the_hosts(kind: str, vocabulary: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.stack([logits_of(kind, vocabulary, seed) for seed in range(count)])
    rows = [row._replace(top_k=0, top_p=1.0, min_p=0.0) for row in rows_for(count, vocabulary, 7)]
    assert agreement(logits, rows, monkeypatch, filtered=False) == []
    assert on_device(logits, rows, filtered=True) == on_device(logits, rows, filtered=False)


def test_draws_at_an_edge_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allowance of the tests above hides nothing: nearly every token is the host's without it."""
    logits = torch.stack([logits_of(KINDS[seed % len(KINDS)], 2000, seed) for seed in range(280)])
    rows = rows_for(280, 2000, 3)
    tokens = on_device(logits, rows)
    wanted = [on_host(values, row, monkeypatch) for values, row in zip(logits, rows, strict=True)]
    assert sum(token != other for token, other in zip(tokens, wanted, strict=True)) <= 1


def test_equal_scores_go_to_the_smaller_ids() -> None:
    logits = torch.zeros(6, 10)
    rows = [
        Row(temperature=0.0),
        Row(top_k=3, number=0.999999),
        Row(top_p=0.3, number=0.999999),  # three of ten, exactly
        Row(top_p=0.31, number=0.999999),
        Row(top_k=5, top_p=0.4, number=0.6),
        Row(number=0.7),
    ]
    assert on_device(logits, rows) == [0, 2, 2, 3, 1, 7]


def test_scores_of_equal_weight_are_ordered_by_score_only_for_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[1.0, 1.0 + 2.0**-23, -5.0]]).expand(2, -1)  # too close for a weight at this temperature
    rows = [Row(temperature=10.0, top_p=0.3), Row(temperature=10.0, top_k=1)]
    assert [on_host(logits[0], row, monkeypatch) for row in rows] == on_device(logits, rows) == [0, 1]


@pytest.mark.parametrize("vocabulary", [8191, 32000, 151936, MAX_VOCABULARY - 1])
def test_the_largest_number_draws_the_last_token(vocabulary: int) -> None:
    logits = torch.zeros(2, vocabulary)
    logits[1, ::3] = -29.1  # about one unit each: the total has more bits than a float64
    rows = [Row(number=1 - 2.0**-53)] * 2
    assert on_device(logits, rows, filtered=False) == [vocabulary - 1, vocabulary - 1 - (vocabulary % 3 == 1)]


@pytest.mark.parametrize("filtered", [False, True])
def test_what_has_no_weight_is_never_drawn(filtered: bool) -> None:
    logits = torch.full((4, 1300), -torch.inf)
    logits[:, 600] = 0.0
    logits[2:, 1299] = 0.0
    logits[:, 700] = -200.0  # exp gives 0
    numbers = (0.0, 1 - 2.0**-53, 0.0, 1 - 2.0**-53)
    assert on_device(logits, [Row(number=number) for number in numbers], filtered=filtered) == [600, 600, 600, 1299]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_usable_logit_say_so_and_leave_others_alone(filtered: bool, temperature: float) -> None:
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = torch.nan
    logits[1] = -torch.inf
    logits[3, 699] = torch.inf
    logits[4] = torch.nan
    row = Row(temperature, top_k=9 if filtered else 0, top_p=0.9 if filtered else 1.0, min_p=0.1 if filtered else 0.0)
    tokens = on_device(logits, [row] * 5, filtered=filtered)
    assert tokens == [-1, -1, on_device(logits[2:3], [row], filtered=filtered)[0], -1, -1]
    assert tokens[2] >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    rows = rows_for(40, 3000, 11)
    logits = torch.stack([logits_of(KINDS[index % len(KINDS)], 3000, index) for index in range(40)]).to(dtype)
    together = on_device(logits, rows, filtered=True)
    assert [on_device(logits[index : index + 1], [row], filtered=True)[0] for index, row in enumerate(rows)] == together
    order = list(range(39, -1, -1))
    assert on_device(logits[order], [rows[index] for index in order], filtered=True) == together[::-1]


def test_draws_follow_the_probabilities() -> None:
    """Numbers spread evenly over [0, 1) give every token its share to one part in the number of draws."""
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, -torch.inf, 0.5])
    draws = 4000
    rows = [Row(0.7, number=(index + 0.5) / draws) for index in range(draws)]
    counts = torch.bincount(torch.tensor(on_device(logits.expand(draws, -1), rows)), minlength=6)
    assert (counts / draws - (logits.double() / 0.7).softmax(0)).abs().max() <= 1 / draws


def test_nobody_looks_at_the_parameters_where_all_is_greedy() -> None:
    nothing = torch.empty(0)
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 1.0]], device=DEVICE)
    tokens = sample(logits, RowParams(*[nothing] * 5), greedy_only=True, filtered=False)
    assert tokens.tolist() == [1, 0]


def test_a_vocabulary_whose_sums_would_overflow_is_refused() -> None:
    logits = torch.empty((1, MAX_VOCABULARY + 1), device="meta")
    with pytest.raises(ValueError, match=str(MAX_VOCABULARY)):
        sample(logits, params_of([Row()]), greedy_only=False, filtered=False)
