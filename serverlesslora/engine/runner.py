"""Computes the work of one step with the transformers model: packs, runs, and keeps only the logits somebody wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from serverlesslora.engine.attention import PagedAttention
from serverlesslora.engine.decode_graphs import DecodeGraphs
from serverlesslora.engine.device import Device
from serverlesslora.engine.host_device import HOST
from serverlesslora.engine.lora import Adapter, LoraModel, Segment
from serverlesslora.engine.pooling import HiddenStates, hidden_states
from serverlesslora.engine.scheduler import Work
from serverlesslora.engine.sequence import Sequence
from serverlesslora_ipc.messages import WorkerLimits


class PromptLogits(NamedTuple):
    """Row i of `logits` predicts prompt token `first` + i."""

    sequence: Sequence
    first: int
    logits: Tensor  # [n, vocab] in the model's dtype


class StepOutput(NamedTuple):
    sampling: list[Sequence]  # the sequences whose next token can be sampled, in the order of the rows
    logits: Tensor  # [len(sampling), vocab] in the model's dtype
    scoring: list[PromptLogits]
    pooling: list[HiddenStates] = []  # noqa: RUF012 (nobody adds to it)


class Runner:
    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraModel,
        limits: WorkerLimits,
        *,
        max_model_len: int,
        device: Device = HOST,
    ) -> None:
        self._model: Any = model
        self._lora = lora
        self._device = model.device
        self.dtype = model.dtype
        self.attention = PagedAttention(model, lambda shapes: device.create_kv(model, limits, shapes))
        self.kv = self.attention.kv
        self.graphs: DecodeGraphs | None = None
        if device.graphs is not None:
            self.graphs = DecodeGraphs(
                model,
                lora,
                self.attention,
                device.graphs,
                max_rows=limits.max_running,
                max_blocks=min(self.kv.num_blocks, -(-max_model_len // limits.block_size)),
            )
        self._row_segments: list[Segment] | None = None
        self._hidden: Tensor | None = None  # of the rows of the step that runs
        freeze_rope(model, max_model_len)
        # The head sees other rows than the body, and it may carry LoRA too.
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._enter_head)

    def release_cached(self) -> None:
        """Memory that torch keeps for the next step goes back to the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Leave the model to another runner."""
        self._hook.remove()
        self.attention.close()

    @torch.inference_mode()
    def run(self, work: list[Work], adapters: Mapping[str, Adapter]) -> StepOutput:
        """`adapters` maps a digest to the loaded adapter. Logits are valid until the next step."""
        if self.graphs is not None and self.graphs.fits(work, adapters):
            return StepOutput([item.sequence for item in work], self.graphs.run(work, adapters), [])
        wanted = [_wanted_positions(item) for item in work]
        rows: list[int] = []
        start = 0
        for item, positions in zip(work, wanted, strict=True):
            rows.extend(start + position - item.start for position in positions)
            start += item.num_tokens
        logits = self._forward(work, rows, [len(positions) for positions in wanted], adapters)

        sampling: list[Sequence] = []
        sampled_rows: list[int] = []
        scoring: list[PromptLogits] = []
        row = 0
        for item, positions in zip(work, wanted, strict=True):
            num_scored = len(positions) - item.samples
            if num_scored:
                scoring.append(PromptLogits(item.sequence, positions[0] + 1, logits[row : row + num_scored]))
                item.sequence.num_scored += num_scored
            row += len(positions)
            if item.samples:
                sampling.append(item.sequence)
                sampled_rows.append(row - 1)
        if len(sampled_rows) < len(rows):
            logits = logits[sampled_rows]
        hidden, self._hidden = self._hidden, None
        return StepOutput(sampling, logits, scoring, [] if hidden is None else hidden_states(work, hidden))

    def _forward(
        self, work: list[Work], rows: list[int], row_counts: list[int], adapters: Mapping[str, Adapter]
    ) -> Tensor:
        """[len(rows), vocab]: the logits of these rows of the packed batch."""
        tokens = [token for s, start, end in work for token in s.token_ids[start:end]]
        positions = [position for _, start, end in work for position in range(start, end)]
        self._lora.set_segments(_segments(work, [item.num_tokens for item in work], adapters))
        self._row_segments = _segments(work, row_counts, adapters)
        self.attention.begin(
            self.kv.plan(
                [item.num_tokens for item in work],
                [item.end for item in work],
                [item.sequence.block_ids for item in work],
            )
        )
        inputs = {
            "input_ids": torch.tensor([tokens], device=self._device),
            "position_ids": torch.tensor([positions], device=self._device),
            "use_cache": False,
        }
        pools = any(item.sequence.pooling for item in work)
        hook = self._model.base_model.register_forward_hook(self._leave_body) if pools else None
        try:
            if rows:
                # The model's own forward knows what its head does besides the matrix (scales, soft caps).
                kept = torch.tensor(rows, device=self._device)
                logits: Tensor = self._model(**inputs, logits_to_keep=kept).logits[0]
            else:
                self._model.base_model(**inputs)
                logits = torch.empty(0, 1, device=self._device)
        finally:
            self._row_segments = None
            if hook is not None:
                hook.remove()
        self.attention.end()
        return logits

    def _leave_body(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._hidden = output[0][0]

    def _enter_head(self, head: nn.Module, args: tuple[Any, ...]) -> None:
        if self._row_segments is not None:  # else the head sees the same rows as the body
            self._lora.set_segments(self._row_segments)


def freeze_rope(model: PreTrainedModel, max_model_len: int) -> None:
    """Fix frequencies that transformers would choose anew from the longest position of each forward.

    A packed step mixes requests: what one request is answered must not depend on how long its neighbour is, nor may
    frequencies change while keys computed with the old ones are in the cache.
    """
    for rotary in model.modules():
        kinds = getattr(rotary, "rope_type", None)
        if kinds is None:
            continue
        # Families whose layers differ in their frequencies have one kind per layer type.
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if "dynamic" not in kind and kind != "longrope":
                continue
            name, choice = ("inv_freq", ()) if layer_type is None else (f"{layer_type}_inv_freq", (layer_type,))
            # The buffer may live in the shared read-only mapping and is about to be written.
            rotary.register_buffer(name, getattr(rotary, name).clone(), persistent=False)
            last = torch.tensor([[max_model_len - 1]], device=model.device)
            rotary(torch.zeros(1, device=model.device), last, *choice)
            if layer_type is None:
                rotary.rope_type = "default"
            else:
                kinds[layer_type] = "default"


def _wanted_positions(item: Work) -> range:
    """The positions of this work whose logits are wanted: prompt positions still to be scored, then the last one."""
    sequence = item.sequence
    first, last = max(item.start, sequence.num_scored), min(item.end, sequence.num_to_score)
    if item.samples:
        # Nothing is sampled before all is scored, so the two are neighbours.
        return range(first if first < last else item.end - 1, item.end)
    return range(first, max(first, last))


def _segments(work: list[Work], counts: list[int], adapters: Mapping[str, Adapter]) -> list[Segment]:
    """Runs of neighbouring rows of the same adapter."""
    segments: list[Segment] = []
    start = 0
    for item, count in zip(work, counts, strict=True):
        if not count:
            continue
        adapter = adapters[item.sequence.adapter] if item.sequence.adapter else None
        if segments and segments[-1].adapter is adapter:
            segments[-1] = segments[-1]._replace(end=start + count)
        else:
            segments.append(Segment(start, start + count, adapter))
        start += count
    return segments
