"""From rows of logits to tokens without leaving the device: the host sampler's order of operations, as torch operators.

Probabilities are summed as integers, in units of 2^-42 of the most probable token's. Such sums are exact whatever the
order of additions, so a row's token depends neither on its neighbours nor on how an operator splits its work; a token
of less than one unit is never drawn. Nothing here waits for the device, and every shape follows from the logits'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
UNIT = 2.0**42  # a sum over 2^20 tokens stays below 2^63
MAX_VOCABULARY = 1 << 20

_BLOCK = 512
# The host sorts what is likely where that is little and holds the nucleus; otherwise it orders by id all but the last
# of these bins of leading bits. The draw runs along that order, so it has to be the same here.
_LIKELY = 2.0**-12
_LIKELY_COUNT = 4096
_BIN_BITS = 15


class RowParams(NamedTuple):
    """One value per row, on the logits' device; where everything is greedy none is looked at."""

    temperature: Tensor  # float32
    top_k: Tensor  # int32, 0: off
    top_p: Tensor  # floating; only in float64 is 0.3 of ten equal tokens three of them
    min_p: Tensor  # float32
    uniform: Tensor  # float64 in [0, 1): the random number of the position


def sample(logits: Tensor, params: RowParams, *, greedy_only: bool, filtered: bool) -> Tensor:
    """One token per row of `logits` [rows, vocabulary], int64 [rows]; -1 where the largest logit is not finite.

    Temperature, top_k, top_p of what is left, min_p relative to the most probable token, then one draw by inverse CDF;
    equal scores by ascending id. `filtered=False` promises that no row has top_k, top_p or min_p: nothing is sorted.
    """
    if logits.shape[1] > MAX_VOCABULARY:
        raise ValueError(f"{logits.shape[1]} logits in a row, at most {MAX_VOCABULARY} can be summed")
    peak, best = logits.max(dim=1)  # the first of equal ones; NaN is larger than everything
    if greedy_only:
        token = best
    else:
        cold = params.temperature < GREEDY_BELOW
        scores = logits.float()
        weights = scores - peak.float()[:, None]
        weights.div_(torch.where(cold, 1.0, params.temperature.float())[:, None]).exp_()
        drawn = _draw_filtered(scores, weights, params) if filtered else _draw(weights, params.uniform)
        # A row of NaN may have led anywhere.
        token = torch.where(cold, best, drawn)
    return torch.where(torch.isfinite(peak), token, -1)


def _draw_filtered(scores: Tensor, weights: Tensor, params: RowParams) -> Tensor:
    vocabulary = scores.shape[1]
    best_only = (params.top_k > 0) & (params.top_k < vocabulary)
    nucleus_only = params.top_p < 1.0
    # Different scores may have equal weights: top_k orders by score, top_p alone by weight.
    order = torch.where(best_only[:, None], scores, weights).sort(dim=1, descending=True, stable=True).indices
    sorted_weights = weights.gather(1, order)
    # Everything below keeps a prefix of this order.
    reached = _units(sorted_weights).cumsum(dim=1)
    kept = torch.where(best_only, params.top_k.long(), vocabulary)
    goal = (params.top_p.double() * _at(reached, kept - 1)).ceil().long()
    within = torch.searchsorted(reached, goal[:, None])[:, 0] + 1
    kept = torch.where(nucleus_only, torch.minimum(within, kept), kept)

    last = _at(sorted_weights, kept - 1)
    floor = params.min_p.float().clamp(max=1.0)
    kept = torch.minimum(kept, (sorted_weights >= floor[:, None]).sum(dim=1)).clamp(min=1)
    total = _at(reached, kept - 1)
    target = _target(params.uniform, total)
    place = _first_above(reached, target)
    in_order = order.gather(1, place.clamp(max=vocabulary - 1)[:, None])[:, 0]

    likely = sorted_weights >= _LIKELY
    count = likely.sum(dim=1)
    settled = (count <= _LIKELY_COUNT) & (_at(reached, count - 1) >= goal)
    by_id = ~best_only & ~(nucleus_only & settled)
    bins = weights.view(torch.int32) >> _BIN_BITS
    edge = torch.where(nucleus_only, last.view(torch.int32) >> _BIN_BITS, -1)
    above = (bins > edge[:, None]) & (weights >= floor[:, None])
    units = torch.where(above, weights, 0.0)
    blocks, sums = _blocks(units)
    ends = sums.cumsum(dim=1)
    drawn = _inside(blocks, ends, target)
    return torch.where(by_id & (target < ends[:, -1]), drawn, in_order)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first id whose cumulative weight exceeds `uniform` of the total."""
    blocks, sums = _blocks(weights)
    ends = sums.cumsum(dim=1)
    return _inside(blocks, ends, _target(uniform, ends[:, -1]))


def _blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Units [rows, blocks, _BLOCK], zeros behind the end, and their sums per block.

    In blocks, because one long row's scan would be left to few threads.
    """
    rows, vocabulary = weights.shape
    num_blocks = -(-vocabulary // _BLOCK)
    units = torch.empty((rows, num_blocks * _BLOCK), dtype=torch.long, device=weights.device)
    units[:, :vocabulary] = weights * UNIT
    units[:, vocabulary:] = 0
    blocks = units.view(rows, num_blocks, _BLOCK)
    return blocks, blocks.sum(dim=2)


def _inside(blocks: Tensor, ends: Tensor, target: Tensor) -> Tensor:
    """The id at which the sum of `blocks`, whose blocks' own cumulative sums are `ends`, exceeds `target`."""
    block = _first_above(ends, target).clamp(max=ends.shape[1] - 1)
    units = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
    before = _at(ends, block) - units.sum(dim=1)
    return block * _BLOCK + _first_above(units.cumsum(dim=1), target - before).clamp(max=_BLOCK - 1)


def _units(weights: Tensor) -> Tensor:
    return (weights * UNIT).long()


def _target(uniform: Tensor, total: Tensor) -> Tensor:
    # Always less than the total: a uniform number is at most 1 - 2^-53, more than rounding could make up for.
    return (uniform.double() * total).long()


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _at(table: Tensor, column: Tensor) -> Tensor:
    return table.gather(1, column.clamp(0, table.shape[1] - 1)[:, None])[:, 0]
