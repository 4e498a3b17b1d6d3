"""Sampling: each parameter against a slow oracle, distributions, determinism, independence of the batch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from serverlesslora.engine.counter_rng import mix64, uniform
from serverlesslora.engine.sampler import Sampled, Sampler, SampleRow, _draw, choice_seed
from serverlesslora_ipc.messages import SamplingParams

INF = float("inf")


def row(seed: int = 0, position: int = 0, **params: Any) -> SampleRow:
    lists = {name: params.pop(name) for name in ("prompt_ids", "output_ids", "banned") if name in params}
    return SampleRow(SamplingParams(**params), seed, position, **lists)


def one(logits: list[float] | torch.Tensor, a_row: SampleRow) -> Sampled:
    return Sampler().sample(torch.as_tensor(logits, dtype=torch.float32)[None], [a_row])[0]


def oracle(logits: torch.Tensor, a_row: SampleRow) -> torch.Tensor:
    """The distribution in float64, by whole-vocabulary sorts."""
    params, scores = a_row.params, logits.double().clone()
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    for token_id in {*a_row.prompt_ids, *a_row.output_ids}:
        value = scores[token_id]
        scores[token_id] = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
    for token_id, count in Counter(a_row.output_ids).items():
        scores[token_id] -= params.presence_penalty + count * params.frequency_penalty
    scores[list(a_row.banned)] = -INF
    scores /= params.temperature
    order = np.argsort(-scores.numpy(), kind="stable").tolist()
    if params.top_k:
        scores[order[params.top_k :]] = -INF
    mass = 0.0
    for kept, probability in enumerate(scores.softmax(0)[order].tolist()):
        if mass >= params.top_p and kept:
            scores[order[kept:]] = -INF
            break
        mass += probability
    probabilities = scores.softmax(0)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


VARIANTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.7},
    {"top_k": 9, "top_p": 0.8},
    {"min_p": 0.2},
    {"top_p": 0.95, "min_p": 0.05, "temperature": 1.5},
    {"logit_bias": {3: 2.0, 4: -100.0}},
    {"repetition_penalty": 1.6, "prompt_ids": (0, 1, 1), "output_ids": (2, 5)},
    {"presence_penalty": 0.8, "frequency_penalty": -0.4, "prompt_ids": (0, 1), "output_ids": (2, 2, 2, 5)},
    {"banned": (0, 1, 7), "top_p": 0.9},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_distribution_matches_the_oracle(variant: dict[str, Any]) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    draws = 2000
    rows = [row(seed=11, position=position, **variant) for position in range(draws)]
    expected = oracle(logits, rows[0]).numpy() * draws
    counts = np.bincount([s.token_id for s in Sampler().sample(logits.repeat(draws, 1), rows)], minlength=12)
    assert counts[expected == 0].sum() == 0
    usable = expected > 0
    statistic = float((((counts - expected) ** 2)[usable] / expected[usable]).sum())
    freedom = int(usable.sum()) - 1
    # Wilson-Hilferty: the 99.99 % point of the chi-squared distribution (the seeds are fixed: never flaky)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, (statistic, counts, expected)


@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0], ids=["equal", "flat", "peaked"])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_support_on_a_large_vocabulary(scale: float, top_p: float) -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * scale
    allowed = set(torch.nonzero(oracle(logits, row(top_p=top_p)))[:, 0].tolist())
    drawn = [s.token_id for s in Sampler().sample(logits.repeat(300, 1), [row(1, i, top_p=top_p) for i in range(300)])]
    # Float32 weights may move the boundary by one token of the 20 000.
    assert len(set(drawn) - allowed) <= 1
    if top_p == 0.9 and scale < 1:
        assert len(set(drawn)) > 290  # and the nucleus is not cut too short


def test_greedy_and_ties_take_the_smaller_id() -> None:
    assert one([0.0, 2.0, 2.0, 1.0], row(temperature=0.0)).token_id == 1
    assert one([0.0, 2.0, 2.0, 1.0], row(temperature=0.0, logprobs=3)).token_id == 1
    assert {one([1.0, 1.0, 1.0, 1.0], row(seed=s, top_k=2)).token_id for s in range(50)} == {0, 1}
    assert {one([1.0, 1.0, 1.0, 1.0], row(seed=s, top_p=0.5)).token_id for s in range(50)} == {0, 1}
    assert one([0.0, 5.0], row(temperature=1e-9)).token_id == 1
    assert one([0.0, 5.0], row(temperature=1e-9, banned=(1,))).token_id == 0


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, -2.0, -INF])
    expected = logits.double().log_softmax(0)
    sampled = one(logits, row(temperature=0.3, top_k=1, logprobs=9, logit_bias={0: 50.0}, presence_penalty=1.0))
    assert sampled.token_id == 0
    assert sampled.logprob == pytest.approx(expected[0].item(), abs=1e-6)
    assert [token_id for token_id, _ in sampled.top] == [1, 2, 0, 3]  # sorted, ties by id, padding left out
    assert [value for _, value in sampled.top] == pytest.approx(expected[[1, 2, 0, 3]].tolist(), abs=1e-6)
    assert one(logits, row(logprobs=0)).top == ()
    assert one(logits, row()).logprob is None
    (scored,) = Sampler().score(logits[None], [3], 2)
    assert scored.token_id == 3
    assert scored.logprob == pytest.approx(expected[3].item(), abs=1e-6)
    assert scored.top == sampled.top[:2]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9, "logprobs": 2}, {"top_k": 2}], ids=str)
def test_unusable_logits_never_give_a_token(params: dict[str, Any]) -> None:
    bad = torch.tensor([[1.0, math.nan, 0.0], [-INF, -INF, -INF], [0.0, INF, 0.0], [0.0, 9.0, -INF]])
    sampled = Sampler().sample(bad, [row(**params)] * 4)
    assert [s.ok for s in sampled] == [False, False, False, True]
    assert [s.token_id for s in sampled] == [-1, -1, -1, 1]
    assert not one([1.0, 2.0], row(banned=(0, 1), **params)).ok
    assert [s.ok for s in Sampler().score(bad, [0, 0, 0, 0], 1)] == [False, False, False, True]


def test_padding_and_foreign_ids() -> None:
    logits = torch.full((40,), -INF)
    logits[:5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    hostile = row(banned=(4, 99, -1), logit_bias={77: 5.0, -3: 5.0}, output_ids=(99, 1), frequency_penalty=0.1)
    for position in range(100):
        assert one(logits, row(position=position, temperature=50.0)).token_id < 5
        assert one(logits, row(position=position, top_k=20, top_p=0.99)).token_id < 5
        assert one(logits, hostile._replace(position=position)).token_id < 4


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [row(seed=i, position=i * 3, logprobs=i % 3 or None, **v) for i, v in enumerate(VARIANTS)]
    rows += [row(temperature=0.0), row(temperature=0.0, logprobs=5)]
    logits = torch.randn(len(rows), 5003, generator=generator) * 2
    batched = Sampler().sample(logits, rows)
    assert batched == [one(values, a_row) for values, a_row in zip(logits, rows, strict=True)]
    order = torch.randperm(len(rows), generator=generator).tolist()
    assert Sampler().sample(logits[order], [rows[i] for i in order]) == [batched[i] for i in order]


def test_a_request_replayed_from_the_middle_continues_with_the_same_tokens() -> None:
    weights = torch.randn(50, 50, generator=torch.Generator().manual_seed(2))  # a first-order "model"

    def generate(prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(one(weights[ids[-1]], row(seed=42, position=len(ids), top_p=0.9)).token_id)
        return ids

    whole = generate([7, 3], 40)
    for cut in (3, 11, 30):
        assert generate(whole[:cut], 42 - cut) == whole
    assert len(set(whole)) > 10


def test_inputs_are_left_untouched() -> None:
    logits = torch.randn(len(VARIANTS), 64, generator=torch.Generator().manual_seed(8))
    before = logits.clone()
    Sampler().sample(logits, [row(logprobs=3, **v) for v in VARIANTS])
    assert torch.equal(logits, before)


def test_counter_rng_is_splitmix64() -> None:
    # Published test vector: the first outputs of SplitMix64 seeded with 1234567.
    gamma = 0x9E3779B97F4A7C15
    stream = [mix64(1234567 + n * gamma) for n in range(1, 4)]
    assert stream == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    numbers = np.array([uniform(seed, position) for seed in range(40) for position in range(250)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    table = numbers.reshape(40, 250)
    assert abs(np.corrcoef(table[:, 0], table[:, 1])[0, 1]) < 0.5
    assert abs(np.corrcoef(table[0], table[1])[0, 1]) < 0.25
    assert len(np.unique(numbers)) == numbers.size


def test_choice_seeds_differ() -> None:
    assert choice_seed(9, 0) == 9
    seeds = {choice_seed(seed, index) for seed in range(-20, 20) for index in range(50)}
    assert len(seeds) == 40 * 50
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("size", [7, 512, 2000])
def test_draw_by_inverse_cdf_never_lands_on_weight_zero(size: int) -> None:
    weights = np.zeros(size, np.float32)
    weights[[2, 3, size - 2]] = [0.25, 0.5, 0.25]
    for number, expected in [(0.0, 2), (0.2499, 2), (0.25, 3), (0.7499, 3), (0.75, size - 2), (1.0 - 2**-53, size - 2)]:
        assert _draw(weights, number) == expected
    assert _draw(weights, 1.0) == size - 2  # rounding may produce it


def test_no_rows() -> None:
    assert Sampler().sample(torch.empty(0, 10), []) == []
