"""Every family through the engine's own runner: mixed batch, chunked prefill and decode equal the eager model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from serverlesslora.engine.attention import bytes_per_token
from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.lora import LoraModel
from serverlesslora.engine.runner import Runner
from serverlesslora.engine.scheduler import Scheduler
from serverlesslora.engine.sequence import Sequence
from serverlesslora.errors import ConfigError
from serverlesslora_ipc.messages import WorkerLimits
from tests.fakes import FAMILIES, tiny_model

TOLERANCE = 1e-4
DECODE_STEPS = 8
BLOCK = 8


def runner_of(model: PreTrainedModel, *, num_blocks: int) -> Runner:
    kv_bytes = num_blocks * BLOCK * bytes_per_token(model.config.get_text_config(), model.dtype)
    limits = WorkerLimits(threads=1, kv_bytes=kv_bytes, block_size=BLOCK)
    return Runner(model, LoraModel(model), limits, max_model_len=64)


def paged_twin(family: str) -> tuple[Runner, Scheduler, BlockManager]:
    model = tiny_model(family)
    blocks = BlockManager(32, BLOCK)
    runner = runner_of(model, num_blocks=32)
    return runner, Scheduler(blocks, max_running=8, max_step_tokens=8), blocks


@torch.inference_mode()
def eager_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits
    return logits[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str) -> None:
    """Prompts of several lengths, the longest in chunks beside sequences that already decode; and a second look at a
    cached prefix. Every sampled row and every scored prompt row is compared."""
    rng = random.Random(family)
    eager = tiny_model(family)
    runner, scheduler, _ = paged_twin(family)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 3, 11, 19)]
    sequences = [Sequence(i, "", list(prompt), len(prompt)) for i, prompt in enumerate(prompts)]
    sequences[2].scores_prompt = True
    sequences.append(Sequence(9, "", [*prompts[3][:16], 7, 8], 18))  # joins late: hits the prefix cache
    for sequence in sequences[:4]:
        scheduler.add(sequence)
    mixed = late = False
    while any(sequence.num_output < DECODE_STEPS for sequence in sequences):
        work = scheduler.schedule()
        sizes = {item.num_tokens for item in work}
        mixed |= len(sizes) > 1 and 1 in sizes
        out = runner.run(work, {})
        scheduler.commit(work)
        assert out.logits.dtype == torch.float32
        for sequence, logits in zip(out.sampling, out.logits, strict=True):
            expected = eager_logits(eager, sequence.token_ids)[-1]
            assert (logits - expected).abs().max() < TOLERANCE, (sequence.sequence_id, sequence.num_tokens)
            sequence.token_ids.append(rng.randrange(256))
        for sequence, first, logits in out.scoring:
            expected = eager_logits(eager, sequence.prompt_ids)[first - 1 : first - 1 + len(logits)]
            assert (logits - expected).abs().max() < TOLERANCE
        for sequence in [s for s in scheduler.running if s.num_output >= DECODE_STEPS]:
            scheduler.remove(sequence)
        if not late and sequences[3].num_output == 2:
            late = True
            scheduler.add(sequences[4])
        scheduler.check()
    assert mixed
    assert sequences[4].num_cached == 16
    assert sequences[2].num_scored == 10


@pytest.mark.parametrize("family", ["mamba", "falcon", "llama4_text"])
def test_families_that_cannot_be_paged_are_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent state, attention of its own, chunked attention."""
    monkeypatch.setitem(FAMILIES, family, {"num_local_experts": 2} if family == "llama4_text" else {})
    model = tiny_model(family)
    with pytest.raises(ConfigError):
        runner_of(model, num_blocks=8)


def test_frequencies_do_not_depend_on_neighbours() -> None:
    """Families that choose rotary frequencies from the longest position in a forward: one choice for all."""
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "rope_theta": 1e4,
    }
    rope |= {"original_max_position_embeddings": 16, "factor": 4.0}
    changes: dict[str, Any] = {
        "rope_parameters": rope,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
    }
    eager, model = tiny_model("phi3", **changes), tiny_model("phi3", **changes)
    runner = runner_of(model, num_blocks=32)
    short = list(range(10))
    answers = []
    for neighbours in ([], [list(range(40))], []):
        scheduler = Scheduler(BlockManager(32, BLOCK), max_running=8, max_step_tokens=64)
        for index, tokens in enumerate([short, *neighbours]):
            scheduler.add(Sequence(index, "", list(tokens), len(tokens)))
        out = runner.run(scheduler.schedule(), {})
        answers.append(out.logits[0])
        if neighbours:
            assert (out.logits[1] - eager_logits(eager, neighbours[0])[-1]).abs().max() < TOLERANCE
    assert (answers[0] - answers[1]).abs().max() < TOLERANCE
    assert (answers[0] - answers[2]).abs().max() < TOLERANCE
