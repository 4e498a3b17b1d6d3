"""Chooses tokens where the logits are; only token ids come to the host, in one transfer per step.

Rows that need more than that (penalties, biases, banned ids, log-probabilities) are chosen by the host's sampler from
a copy of their logits. Both follow the same order of operations and the same random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serverlesslora.engine.counter_rng import uniform
from serverlesslora.engine.device import Choosing
from serverlesslora.engine.sampler import GREEDY_BELOW, UNUSABLE, Sampled, Sampler, SampleRow, is_adjusted
from serverlesslora_kernels.cuda.sampling import RowParams, sample


class _OnDevice:
    """The ids are on their way to pinned memory; whoever waits, waits for this copy alone."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._event: torch.cuda.Event | None = None
        self._copy = tokens
        if tokens.is_cuda:
            self._copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._copy.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[Sampled]:
        if self._event is not None:
            self._event.synchronize()
        return [Sampled(token) if token >= 0 else UNUSABLE for token in self._copy.tolist()]


class _Mixed:
    """Some rows on the device, some on the host."""

    tokens = None

    def __init__(self, host: Sampler, logits: Tensor, rows: Sequence[SampleRow], on_host: Sequence[int]) -> None:
        self._on_device = _OnDevice(sample_rows(logits, rows))
        self._on_host = host.begin(logits[list(on_host)], [rows[index] for index in on_host])
        self._indices = on_host

    def wait(self) -> list[Sampled]:
        chosen = self._on_device.wait()
        for index, sampled in zip(self._indices, self._on_host.wait(), strict=True):
            chosen[index] = sampled
        return chosen


class DeviceSampler:
    def __init__(self) -> None:
        self._host = Sampler()

    def begin(self, logits: Tensor, rows: Sequence[SampleRow]) -> Choosing:
        on_host = [index for index, row in enumerate(rows) if _needs_host(row)]
        if len(on_host) == len(rows):
            return self._host.begin(logits, rows)
        if on_host:
            return _Mixed(self._host, logits, rows, on_host)
        return _OnDevice(sample_rows(logits, rows))

    def is_on_device(self, rows: Sequence[SampleRow]) -> bool:
        return not any(_needs_host(row) for row in rows)

    def score(self, logits: Tensor, token_ids: Sequence[int], alternatives: int) -> list[Sampled]:
        return self._host.score(logits, token_ids, alternatives)


def _needs_host(row: SampleRow) -> bool:
    return row.params.logprobs is not None or is_adjusted(row)


def sample_rows(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """int64 [rows], -1 where no logit is usable; does not wait for the device."""
    params = [row.params for row in rows]
    greedy = all(row.temperature < GREEDY_BELOW for row in params)
    filtered = any(row.top_k or row.top_p < 1.0 or row.min_p for row in params)
    return sample(logits, _row_params(rows, greedy, logits.device), greedy_only=greedy, filtered=filtered)


def _row_params(rows: Sequence[SampleRow], greedy: bool, device: torch.device) -> RowParams:
    """One copy to the device for all rows; none where everything is greedy and nobody looks."""
    if greedy:
        nothing = torch.empty(0, device=device)
        return RowParams(nothing, nothing, nothing, nothing, nothing)
    numbers = [0.0 if r.params.temperature < GREEDY_BELOW else uniform(r.seed, r.position) for r in rows]
    values = torch.tensor(
        [
            [row.params.temperature for row in rows],
            [row.params.top_k for row in rows],
            [row.params.top_p for row in rows],
            [row.params.min_p for row in rows],
            numbers,
        ],
        dtype=torch.float64,
        pin_memory=device.type == "cuda",
    )
    values = values.to(device, non_blocking=True)
    return RowParams(
        temperature=values[0].float(),
        top_k=values[1].int(),
        top_p=values[2],  # not rounded: it decides whether the last token of a nucleus belongs to it
        min_p=values[3],
        uniform=values[4],
    )
