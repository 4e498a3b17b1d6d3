"""Families through the CUDA engine: prompts in chunks, then decode steps as graphs, give the eager model's tokens."""

from __future__ import annotations

import random

import pytest

from serverlesslora.engine.cuda.device import CudaDevice
from tests.fakes import FAMILIES, tiny_model
from tests.test_cuda_engine import replays  # noqa: F401  (a fixture)
from tests.test_engine import Bench, solo

# Windows, soft caps, sinks, experts, values narrower than keys, no rotary embedding, heads of odd sizes.
USUAL = ("llama:tied_bias", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "qwen3", "phi3")
# Their code looks at its data on the way (a dictionary of masks, a scale out of a tensor): eager, and said so.
NOT_CAPTURED = {"gpt2", "gpt2:inverse_layer"}


@pytest.mark.parametrize(
    "family", [family if family in USUAL else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_family_equals_eager(family: str, device: CudaDevice, replays: list[list[str]]) -> None:  # noqa: F811
    rng = random.Random(family)
    bench = Bench(blocks=256, device=device, model=tiny_model(family), max_running=2, max_step_tokens=8)
    bench.engine.capture()
    prompts = {f"r{length}": [rng.randrange(256) for _ in range(length)] for length in (3, 11)}
    for name, prompt in prompts.items():
        bench.ask(name, prompt, max_tokens=4)
    bench.run()
    for name, prompt in prompts.items():
        assert bench.answers[name].tokens() == solo(tiny_model(family), prompt, 4)
    assert bench.engine.graphs_state.startswith("off: it waits" if family in NOT_CAPTURED else "on")
    assert bool(replays) is (family not in NOT_CAPTURED)
