"""The engine on the emulated device: the interpreter, recorded graphs, elastic KV; tokens are a lonely eager run's.

What the twin of a CUDA graph repeats is what was recorded, so an input that is not refreshed shows here as on a GPU.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from serverlesslora.engine.cuda.device import CudaDevice
from serverlesslora.engine.cuda.kv import DeviceKvStore
from serverlesslora.engine.cuda.lora_store import DeviceLora
from serverlesslora.engine.cuda.sampler import DeviceSampler, sample_rows
from serverlesslora.engine.decode_graphs import DecodeGraphs
from serverlesslora.engine.engine import FORGET_AFTER_S, STARVED_S
from serverlesslora.engine.runner import Runner
from serverlesslora.engine.sampler import Sampler, SampleRow
from serverlesslora.engine.scheduler import Work
from serverlesslora_ipc.messages import Aborted, Failed, Finished, SamplingParams
from tests.fakes import ATTENTION_AND_HEAD, ManualClock, merge_adapter, tiny_model, write_adapter
from tests.test_engine import Bench, prompt_of, solo

RANKS = {"a": 2, "b": 3, "head": 8, "wide": 33}
BODY = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    return {
        name: write_adapter(
            root / name,
            model,
            rank=rank,
            seed=rank,
            scale=0.4,
            targets=ATTENTION_AND_HEAD if name == "head" else BODY,
        )
        for name, rank in RANKS.items()
    }


@pytest.fixture(scope="module")
def oracles(adapters: dict[str, Path]) -> dict[str, PreTrainedModel]:
    return {"": tiny_model()} | {name: merge_adapter(tiny_model(), path) for name, path in adapters.items()}


def graphs_of(bench: Bench) -> DecodeGraphs:
    graphs = bench.engine._runner.graphs
    assert graphs is not None
    return graphs


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The adapters of every step that a graph computed."""
    steps: list[list[str]] = []
    run = DecodeGraphs.run

    def noted(self: DecodeGraphs, work: list[Work], *args: object, **options: object) -> torch.Tensor:
        steps.append([item.sequence.adapter for item in work])
        return run(self, work, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeGraphs, "run", noted)
    return steps


@pytest.mark.parametrize("captured", [True, False], ids=["graphs", "eager"])
def test_interleaved_requests_get_the_tokens_of_a_lonely_run(
    captured: bool,
    device: CudaDevice,
    adapters: dict[str, Path],
    oracles: dict[str, PreTrainedModel],
    replays: list[list[str]],
) -> None:
    rng = random.Random(7)
    bench = Bench(blocks=256, device=device, max_running=2, max_step_tokens=12)
    if captured:
        bench.engine.capture()
        assert bench.engine.graphs_state == "on, up to 2 rows"
    expected: dict[str, list[int]] = {}
    for index, name in enumerate(["", "a", "wide", "a", "head"] if captured else ["", "b"]):
        if name:
            bench.load(adapters[name], name)  # adapters come while others run
        prompt, count = prompt_of(rng, 16), rng.randint(3, 5)
        bench.ask(f"r{index}", prompt, name or None, max_tokens=count)
        expected[f"r{index}"] = solo(oracles[name], prompt, count)
        bench.step()
    bench.run()
    for name, tokens in expected.items():
        assert bench.answers[name].tokens() == tokens, name
        assert isinstance(bench.answers[name].end, Finished)
    assert {name for step in replays for name in step} == ({"", "a", "wide"} if captured else set())
    assert ["", "a"] in replays or not captured, "one step, two functions"


def test_a_sampled_request_gets_the_same_tokens_as_on_the_host(device: CudaDevice, adapters: dict[str, Path]) -> None:
    params: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 5, "max_tokens": 6}
    benches = [Bench(blocks=64), Bench(blocks=64, device=device, max_running=2)]
    benches[1].engine.capture()
    for bench in benches:
        bench.load(adapters["a"], "a")
        bench.ask("plain", [1, 2, 3], "a", **params)
        bench.ask("penalised", [4, 5], None, **params, presence_penalty=0.5, logprobs=2)
        bench.run()
    for name in ("plain", "penalised"):
        assert benches[0].answers[name].tokens() == benches[1].answers[name].tokens()


def test_the_next_step_is_launched_before_the_last_one_is_read(device: CudaDevice, replays: list[list[str]]) -> None:
    bench = Bench(blocks=64, device=device, max_running=1)
    bench.engine.capture()
    answer = bench.ask("r", [1, 2, 3], max_tokens=5)
    bench.step()
    assert len(answer.deltas) == 1, "the prompt's token is known"
    assert len(replays) == 1, "and the step after it is on its way"
    assert bench.engine._ahead is not None
    bench.run()
    assert answer.tokens() == solo(tiny_model(), [1, 2, 3], 5)
    assert len(replays) == 4, "nothing is launched behind the last token"


def test_a_request_aborted_while_its_step_is_on_its_way(
    device: CudaDevice, oracles: dict[str, PreTrainedModel]
) -> None:
    bench = Bench(blocks=64, device=device, max_running=2)
    bench.engine.capture()
    gone = bench.ask("gone", [9, 8, 7], max_tokens=30)
    kept = bench.ask("kept", [1, 2, 3], max_tokens=6)
    bench.step()
    assert bench.engine._ahead is not None
    bench.engine.abort("gone")
    bench.engine.check()
    again = bench.ask("again", [5, 5], max_tokens=4)  # in its place
    bench.run()
    assert isinstance(gone.end, Aborted)
    assert kept.tokens() == solo(oracles[""], [1, 2, 3], 6)
    assert again.tokens() == solo(oracles[""], [5, 5], 4)


def test_a_row_without_a_token_ends_alone_though_its_next_step_is_on_its_way(
    device: CudaDevice, oracles: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def damaged(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        tokens = sample_rows(logits, rows)
        if calls == 3:
            tokens[0] = -1  # what is chosen where no logit is usable
        return tokens

    monkeypatch.setattr("serverlesslora.engine.cuda.sampler.sample_rows", damaged)
    bench = Bench(blocks=64, device=device, max_running=2)
    bench.engine.capture()
    bad, good = bench.ask("bad", [9, 8, 7], max_tokens=6), bench.ask("good", [1, 2, 3], max_tokens=6)
    bench.run()
    assert isinstance(bad.end, Failed)
    assert (bad.end.error.code, len(bad.tokens())) == ("nan_logits", 2)
    assert good.tokens() == solo(oracles[""], [1, 2, 3], 6)


def test_an_adapter_dropped_from_the_device_comes_back(
    device: CudaDevice, adapters: dict[str, Path], oracles: dict[str, PreTrainedModel]
) -> None:
    bench = Bench(blocks=64, device=device, max_running=2)
    for name in ("a", "b"):
        bench.load(adapters[name], name)
        bench.ask(f"first {name}", [1, 2, 3], name, max_tokens=3)
    bench.run()
    store = device._store
    assert store is not None
    before = store.resident_bytes
    assert store.drop_unused() == before > 0
    assert store.resident_bytes == 0
    answers = {name: bench.ask(f"then {name}", [1, 2, 3], name, max_tokens=3) for name in ("b", "a")}
    bench.run()
    assert store.resident_bytes == before
    for name, answer in answers.items():
        assert answer.tokens() == solo(oracles[name], [1, 2, 3], 3)


def test_a_slot_is_used_again_without_a_trace_of_its_last_adapter(
    device: CudaDevice, adapters: dict[str, Path], oracles: dict[str, PreTrainedModel], replays: list[list[str]]
) -> None:
    bench = Bench(blocks=64, device=device, max_running=1)
    bench.engine.capture()
    slots = set()
    for name in ("wide", "a", "b"):
        bench.load(adapters[name], name)
        lora = bench.engine._adapters.by_digest[name].lora
        assert isinstance(lora, DeviceLora)
        slots.add(lora.slot)
        answer = bench.ask(name, [1, 2, 3], name, max_tokens=3)
        bench.run()
        assert answer.tokens() == solo(oracles[name], [1, 2, 3], 3)
        entries = device._store._tables._entries[:, lora.slot]  # type: ignore[union-attr]
        assert entries.any()
        bench.engine.unload_adapter(name)
        assert not entries.any(), "who comes next may bring nothing for the kernels, and would be given what was there"
    assert len(slots) == 1
    assert replays == [["wide"]] * 2 + [["a"]] * 2 + [["b"]] * 2


def test_the_host_and_the_device_choose_the_same_tokens() -> None:
    # Equal logits make a nucleus of exactly three tokens: a rounded top_p would let a fourth in.
    logits = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    logits[:20, :10], logits[:20, 10:] = 1.0, -math.inf
    params = [SamplingParams(temperature=1.0, top_p=0.3)] * 20 + [
        SamplingParams(
            temperature=0.2 + 0.1 * i, top_k=3 * (i % 4), top_p=(1.0, 0.7)[i % 2], min_p=(0.0, 0.05)[i % 3 > 1]
        )
        for i in range(20)
    ]
    rows = [SampleRow(row, seed=index, position=7 * index) for index, row in enumerate(params)]
    on_device = DeviceSampler().begin(logits, rows)
    assert on_device.tokens is not None
    assert on_device.wait() == Sampler().sample(logits, rows)


def test_memory_that_others_hold_is_waited_for(device: CudaDevice, oracles: dict[str, PreTrainedModel]) -> None:
    bench = Bench(blocks=64, device=device, max_running=2)
    room = device.driver.memory().free_bytes // device.driver.granularity() * device.driver.granularity()
    held = device.driver.create(room)  # another worker's
    waiting = bench.ask("waiting", [1, 2, 3], max_tokens=3)
    for _ in range(3):
        bench.step()
        assert bench.engine.is_starved
    assert waiting.started is None
    device.driver.release(held)
    bench.run()
    assert not bench.engine.is_starved
    assert waiting.tokens() == solo(oracles[""], [1, 2, 3], 3)


def test_who_gets_no_memory_is_told_in_the_end(device: CudaDevice) -> None:
    clock = ManualClock(tick=1.0)
    bench = Bench(blocks=64, device=device, max_running=2, clock=clock)
    room = device.driver.memory().free_bytes // device.driver.granularity() * device.driver.granularity()
    held = device.driver.create(room)
    refused = bench.ask("refused", [1, 2, 3], max_tokens=3)
    clock.now += STARVED_S / 2
    bench.step()
    assert refused.end is None
    clock.now += STARVED_S
    bench.step()
    assert isinstance(refused.end, Failed)
    assert (refused.end.error.status, refused.end.error.code) == (503, "unavailable")
    assert not bench.engine.has_work
    device.driver.release(held)


def test_memory_goes_back_while_nobody_asks(device: CudaDevice, oracles: dict[str, PreTrainedModel]) -> None:
    bench = Bench(blocks=64, device=device, max_running=2)
    kv, pool = bench.engine._runner.kv, bench.engine._pool
    assert isinstance(kv, DeviceKvStore) and pool is not None
    before = device.driver.memory().free_bytes
    assert kv.size_bytes == kv.chunk_bytes, "the first chunk, where every view starts, has memory for good"
    prompt = list(range(20))
    bench.ask("first", prompt, max_tokens=2)
    bench.run()
    taken = pool.resident_bytes
    assert taken == kv.size_bytes > 0
    assert device.driver.memory().free_bytes == before - taken + kv.chunk_bytes
    bench.engine.rest(1.0)
    again = bench.ask("again", prompt, max_tokens=2)
    bench.run()
    assert again.started is not None
    assert again.started.cached_tokens == 16, "a short rest forgets no prefix"
    assert bench.engine.rest(FORGET_AFTER_S) == taken
    assert device.driver.memory().free_bytes == before
    starts = [view.data_ptr() - kv._range.address for layer in kv._layers for view in layer]
    assert all(kv._range.is_resident(start // kv.chunk_bytes) for start in starts), "a launch would be refused"
    last = bench.ask("last", prompt, max_tokens=2)
    bench.run()
    assert last.started is not None
    assert last.started.cached_tokens == 0
    assert last.tokens() == again.tokens() == solo(oracles[""], prompt, 2)


def test_waiting_for_memory_is_counted_for_each_request(device: CudaDevice) -> None:
    clock = ManualClock(tick=0.01)
    bench = Bench(blocks=64, device=device, max_running=2, clock=clock)
    room = device.driver.memory().free_bytes // device.driver.granularity() * device.driver.granularity()
    held = device.driver.create(room)
    bench.ask("gone", [1, 2, 3], max_tokens=3)
    bench.step()
    bench.engine.abort("gone")
    assert not bench.engine.is_starved
    clock.now += 2 * STARVED_S
    later = bench.ask("later", [1, 2, 3], max_tokens=3)
    bench.step()
    assert later.end is None
    clock.now += 2 * STARVED_S
    behind = bench.ask("behind", [1, 2, 3], max_tokens=3)
    bench.step()
    assert isinstance(later.end, Failed)
    bench.step()
    assert behind.end is None
    device.driver.release(held)
    bench.run()


def test_a_pause_after_an_abort_is_not_billed(device: CudaDevice) -> None:
    clock = ManualClock(tick=0.01)
    bench = Bench(blocks=64, device=device, max_running=1, clock=clock)
    bench.engine.capture()
    bench.ask("gone", [1, 2, 3], max_tokens=9)
    bench.step()
    assert bench.engine._ahead is not None
    bench.engine.abort("gone")
    clock.now += 1000.0
    bench.ask("next", [1, 2, 3], max_tokens=2)
    bench.run()
    assert bench.engine.stats().busy_s < 100


def test_a_step_without_memory_ends_its_requests_and_nothing_else(
    device: CudaDevice, oracles: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(blocks=64, device=device, max_running=2)
    run = Runner.run
    failures = [torch.OutOfMemoryError("once"), torch.OutOfMemoryError("twice")]

    def short_of_memory(self: Runner, *args: Any) -> Any:
        if failures:
            raise failures.pop()
        return run(self, *args)

    monkeypatch.setattr(Runner, "run", short_of_memory)
    refused = bench.ask("refused", [1, 2, 3], max_tokens=3)
    bench.step()
    assert isinstance(refused.end, Failed)
    assert refused.end.error.status == 503
    failures.append(torch.OutOfMemoryError("once"))  # what torch had cached is enough for the second try
    served = bench.ask("served", [1, 2, 3], max_tokens=3)
    bench.run()
    assert served.tokens() == solo(oracles[""], [1, 2, 3], 3)
