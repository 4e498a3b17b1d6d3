"""The engine end to end in float32: whatever happens around a request, its tokens are those of a lonely eager run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from serverlesslora.engine.blocks import BlockManager, PrefixKey
from serverlesslora.engine.device import Device
from serverlesslora.engine.engine import Engine
from serverlesslora.engine.host_device import HOST
from serverlesslora.engine.lora import LoraModel
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.engine.request import PATIENCE_S
from serverlesslora.engine.sequence import Sequence
from serverlesslora.engine.shortcuts import take_shortcuts
from serverlesslora_ipc.messages import (
    Aborted,
    Delta,
    Failed,
    Finished,
    Generate,
    LoadAdapter,
    Loaded,
    PromptEcho,
    SamplingParams,
    Spent,
    Started,
    TextPrompt,
    TokensPrompt,
    WorkerLimits,
    WorkerToGateway,
)
from tests.fakes import EOS, ManualClock, byte_tokenizer, merge_adapter, tiny_model, write_adapter

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
KV_TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, float32
BLOCK = 8


@dataclass
class Answer:
    """What a client saw of one request, with the order of messages checked."""

    started: Started | None = None
    echo: PromptEcho | None = None
    deltas: list[Delta] = field(default_factory=list)
    end: Finished | Failed | Aborted | None = None
    is_aborted: bool = False

    @property
    def spent(self) -> Spent:
        assert self.end is not None
        return self.end.spent

    def take(self, message: Any) -> None:
        assert self.end is None, f"{message} after the end"
        assert not self.is_aborted or isinstance(message, Aborted), f"{message} after the abort"
        match message:
            case Started():
                assert self.started is None
                self.started = message
            case PromptEcho():
                assert self.started is not None
                assert self.echo is None
                assert not self.deltas
                self.echo = message
            case Delta():
                assert self.started is not None
                assert all(d.finish_reason is None for d in self.deltas if d.index == message.index)
                self.deltas.append(message)
            case Finished():
                assert self.started is not None
                self.end = message
            case Failed() | Aborted():
                self.end = message

    def tokens(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.index == index for token in delta.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas if delta.index == index)


class Bench:
    """An engine on a tiny Llama, driven step by step with every invariant checked after each."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        clock: Callable[[], float] | None = None,
        device: Device = HOST,
        model: PreTrainedModel | None = None,
        **limits: Any,
    ) -> None:
        self.model = model or tiny_model()
        lora = LoraModel(self.model, device)
        if device is not HOST:
            take_shortcuts(self.model, device)
        self.engine = Engine(
            self.model,
            lora,
            TextCodec(byte_tokenizer()),
            WorkerLimits(threads=1, kv_bytes=blocks * BLOCK * KV_TOKEN_BYTES, block_size=BLOCK, **limits),
            clock or ManualClock(tick=0.125),
            device,
        )
        assert device is not HOST or self.engine.stats().kv_total_blocks == blocks
        self.answers: dict[str, Answer] = {}

    def load(self, path: Path, digest: str) -> None:
        assert isinstance(self.engine.load_adapter(LoadAdapter(digest, str(path))), Loaded)

    def ask(
        self,
        name: str,
        prompt: list[int] | str,
        adapter: str | None = None,
        *,
        n: int = 1,
        echo: bool = False,
        deadline: float | None = None,
        **params: Any,
    ) -> Answer:
        shape = TextPrompt(prompt) if isinstance(prompt, str) else TokensPrompt(tuple(prompt))
        sampling = SamplingParams(**(GREEDY | {"max_tokens": 8} | params))
        self.engine.submit(Generate(name, adapter, shape, sampling, n, echo, deadline))
        answer = self.answers[name] = Answer()
        return answer

    def abort(self, name: str) -> None:
        self.answers[name].is_aborted = name in self.engine._requests
        self.engine.abort(name)
        self.engine.check()

    def step(self) -> None:
        self.take(self.engine.step())

    def take(self, messages: list[WorkerToGateway]) -> None:
        for message in messages:
            self.answers[message.request_id].take(message)  # type: ignore[union-attr]
        self.engine.check()

    def run(self) -> None:
        while self.engine.has_work:
            self.step()
        assert self.engine.stats().kv_used_blocks == 0


@torch.inference_mode()
def solo(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy, one sequence, everything computed again for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    return {
        name: write_adapter(root / name, model, rank=rank, seed=rank, scale=0.4)
        for name, rank in (("a", 2), ("b", 3), ("c", 8))
    }


@pytest.fixture(scope="module")
def oracles(adapters: dict[str, Path]) -> dict[str, PreTrainedModel]:
    return {"": tiny_model()} | {name: merge_adapter(tiny_model(), path) for name, path in adapters.items()}


def prompt_of(rng: random.Random, longest: int = 40) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randint(1, longest))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("blocks", "limits"),
    [
        pytest.param(128, {}, id="plenty"),
        pytest.param(11, {"max_running": 6}, id="preempted"),
        pytest.param(
            11, {"max_running": 6, "prefix_cache": False, "max_step_tokens": 9}, id="preempted-chunks-uncached"
        ),
    ],
)
def test_interleaving_changes_no_token(
    seed: int, blocks: int, limits: dict[str, Any], adapters: dict[str, Path], oracles: dict[str, PreTrainedModel]
) -> None:
    rng = random.Random(seed)
    bench = Bench(blocks=blocks, **limits)
    for name, path in adapters.items():
        bench.load(path, name)
    shared = prompt_of(rng, 30)
    expected: dict[str, list[int]] = {}
    for index in range(16):
        prompt = (shared if rng.random() < 0.5 else []) + prompt_of(rng, 20)
        adapter, count = rng.choice(list(oracles)), rng.randint(1, 36)
        name = f"r{index}"
        bench.ask(name, prompt, adapter or None, max_tokens=count)
        expected[name] = solo(oracles[adapter], prompt, count)
        for _ in range(rng.randrange(4)):
            bench.step()
    bench.run()
    for name, tokens in expected.items():
        assert bench.answers[name].tokens() == tokens
    assert (bench.engine.stats().preemptions > 0) == (blocks == 11)


def test_adapters_give_different_answers(oracles: dict[str, PreTrainedModel]) -> None:
    prompt = list(b"the same words")
    assert len({tuple(solo(model, prompt, 8)) for model in oracles.values()}) == 4


def test_warm_prefix_equals_cold(adapters: dict[str, Path], oracles: dict[str, PreTrainedModel]) -> None:
    bench = Bench()
    bench.load(adapters["a"], "a")
    prompt = list(range(40))
    for adapter in ("", "a"):
        cold = bench.ask(f"cold-{adapter}", prompt, adapter or None)
        bench.run()
        warm = bench.ask(f"warm-{adapter}", prompt, adapter or None)
        bench.run()
        assert cold.tokens() == warm.tokens() == solo(oracles[adapter], prompt, 8)
        assert isinstance(cold.end, Finished)
        assert isinstance(warm.end, Finished)
        assert (cold.end.cached_tokens, warm.end.cached_tokens) == (0, 32)
    # The answer of the first turn is in the cache for the second turn.
    again = bench.ask("turn", prompt + solo(oracles[""], prompt, 8))
    bench.run()
    assert isinstance(again.end, Finished)
    assert again.end.cached_tokens == 40
    stats = bench.engine.stats()
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens) == (104, 208)


def test_new_weights_answer_at_once(
    adapters: dict[str, Path], oracles: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is deployed again while it is busy: the old request ends on the old weights, the new one never sees the
    old one's KV. With a key that forgets the digest, it would: that proves the test can fail."""
    prompt = list(range(40))

    def redeploy() -> tuple[Answer, Answer]:
        bench = Bench()
        bench.load(adapters["a"], "digest-1")
        old = bench.ask("old", prompt, "digest-1", max_tokens=12)
        for _ in range(5):
            bench.step()
        bench.load(adapters["b"], "digest-2")
        bench.engine.unload_adapter("digest-1")
        assert bench.engine.stats().adapters == ("digest-2",)
        resident = bench.engine.stats().adapter_bytes
        new = bench.ask("new", prompt, "digest-2")
        refused = bench.ask("refused", prompt, "digest-1")
        bench.run()
        assert bench.engine.stats().adapter_bytes < resident, "the old adapter is still in memory"
        assert old.tokens() == solo(oracles["a"], prompt, 12)
        assert isinstance(refused.end, Failed)
        assert refused.end.error.status == 404
        return old, new

    _, new = redeploy()
    assert new.tokens() == solo(oracles["b"], prompt, 8)

    key = BlockManager._key

    def careless(self: BlockManager, sequence: Sequence, index: int) -> PrefixKey:
        return key(self, sequence, index)._replace(adapter="")

    monkeypatch.setattr(BlockManager, "_key", careless)
    _, new = redeploy()
    assert new.tokens() != solo(oracles["b"], prompt, 8)


def test_loading_again_what_still_runs_keeps_it(adapters: dict[str, Path], oracles: dict[str, PreTrainedModel]) -> None:
    bench = Bench()
    bench.load(adapters["a"], "a")
    first = bench.ask("first", [1, 2, 3], "a")
    bench.step()
    bench.engine.unload_adapter("a")
    bench.load(adapters["a"], "a")
    second = bench.ask("second", [1, 2, 3], "a")
    bench.run()
    assert first.tokens() == second.tokens() == solo(oracles["a"], [1, 2, 3], 8)
    assert bench.engine.stats().adapters == ("a",)
    bench.engine.unload_adapter("a")
    assert bench.engine.stats().adapters == ()
    assert bench.engine.stats().adapter_bytes == 0


def test_abort_frees_at_once() -> None:
    bench = Bench(max_running=2)
    for name in ("x", "y", "z"):
        bench.ask(name, [ord(name)] * 20, max_tokens=50)
    for _ in range(3):
        bench.step()
    before = bench.engine.stats()
    assert (before.running, before.waiting) == (2, 1)
    bench.engine.abort("z")
    bench.engine.abort("x")
    bench.engine.abort("never heard of")
    bench.engine.check()
    after = bench.engine.stats()
    assert (after.running, after.waiting) == (1, 0)
    assert after.kv_used_blocks == before.kv_used_blocks // 2
    bench.run()
    assert isinstance(bench.answers["x"].end, Aborted)
    assert isinstance(bench.answers["z"].end, Aborted)
    assert bench.answers["y"].tokens() == solo(tiny_model(), [ord("y")] * 20, 50)


def test_choices_share_the_prompt_and_differ() -> None:
    bench = Bench()
    prompt = list(range(30))
    params: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    three = bench.ask("three", prompt, n=3, **params)
    bench.run()
    assert len({tuple(three.tokens(index)) for index in range(3)}) == 3
    assert isinstance(three.end, Finished)
    assert (three.end.prompt_tokens, three.end.completion_tokens) == (30, 36)
    stats = bench.engine.stats()
    assert stats.prefix_hit_tokens == 2 * 24
    # Alone, in another order, in another engine: the same tokens.
    other = Bench(prefix_cache=False, max_running=2, max_step_tokens=7)
    other.ask("noise", [9] * 11, max_tokens=30)
    again = other.ask("three", prompt, n=3, **params)
    one = other.ask("one", prompt, **params)
    other.run()
    assert [again.tokens(index) for index in range(3)] == [three.tokens(index) for index in range(3)]
    assert one.tokens() == three.tokens(0)


def test_preempted_random_choices_keep_their_tokens() -> None:
    roomy, tight = Bench(), Bench(blocks=8)
    for bench in (roomy, tight):
        for name in ("x", "y", "z"):
            bench.ask(name, list(name.encode()) * 5, temperature=1.0, seed=ord(name), max_tokens=40)
        bench.run()
    assert tight.engine.stats().preemptions > 0
    for name in ("x", "y", "z"):
        assert tight.answers[name].tokens() == roomy.answers[name].tokens()


def test_context_limit() -> None:
    bench = Bench(max_model_len=32)
    full = bench.ask("full", [1] * 20, max_tokens=None)
    fits = bench.ask("fits", [1] * 20, max_tokens=12)
    long = bench.ask("long", [1] * 20, max_tokens=13)
    longer = bench.ask("longer", [1] * 32, max_tokens=None)
    bench.run()
    assert len(full.tokens()) == len(fits.tokens()) == 12
    assert full.deltas[-1].finish_reason == "length"
    for answer, requested in ((long, "33"), (longer, "33")):
        assert isinstance(answer.end, Failed)
        assert (answer.end.error.status, answer.end.error.code) == (400, "context_length_exceeded")
        assert "32 tokens" in answer.end.error.message
        assert requested in answer.end.error.message


def test_prompt_that_never_fits_the_cache_is_refused() -> None:
    bench = Bench(blocks=4)
    exact = bench.ask("exact", [1] * 24, max_tokens=8)
    beyond = bench.ask("beyond", [1] * 24, max_tokens=9)
    bench.run()
    assert len(exact.tokens()) == 8
    assert isinstance(beyond.end, Failed)
    assert "KV cache holds 32 tokens" in beyond.end.error.message


@pytest.mark.parametrize(
    ("prompt", "status"), [([260], 400), ([-1], 400), ([3, 1 << 40], 400)], ids=["past", "negative", "huge"]
)
def test_tokens_outside_the_vocabulary_are_refused(prompt: list[int], status: int) -> None:
    bench = Bench()
    answer = bench.ask("bad", prompt)
    good = bench.ask("good", [1])
    bench.run()
    assert isinstance(answer.end, Failed)
    assert answer.end.error.status == status
    assert isinstance(good.end, Finished)


def test_stop_string_and_text() -> None:
    bench = Bench()
    free = bench.ask("free", "hello", max_tokens=30, logprobs=2)
    bench.run()
    text = "".join(chr(token) for token in free.tokens() if token < 128)
    assert all(delta.logprobs and len(delta.logprobs[0].top) == 2 for delta in free.deltas)
    stop = next((text[i : i + 2] for i in range(4, len(text) - 1)), None)
    assert stop is not None
    cut = bench.ask("cut", "hello", max_tokens=30, stop=(stop,))
    bench.run()
    if cut.deltas[-1].finish_reason == "stop":
        assert cut.deltas[-1].stop_reason == stop
        assert stop not in cut.text()
    assert free.text().startswith(cut.text())


def test_end_of_sequence_and_its_minimum() -> None:
    bench = Bench()
    bias = {EOS: 100.0}
    at_once = bench.ask("at once", [1, 2], ignore_eos=False, logit_bias=bias)
    later = bench.ask("later", [1, 2], ignore_eos=False, logit_bias=bias, min_tokens=3)
    never = bench.ask("never", [1, 2], ignore_eos=True, logit_bias=bias)
    bench.run()
    assert at_once.tokens() == [EOS]
    assert at_once.text() == ""
    assert at_once.deltas[-1].finish_reason == "stop"
    assert len(later.tokens()) == 4
    assert len(never.tokens()) == 8


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("max_step_tokens", [512, 7])
def test_prompt_logprobs(max_tokens: int, max_step_tokens: int) -> None:
    bench = Bench(max_step_tokens=max_step_tokens, max_running=4)
    prompt = [*b"echo this back, please"]
    bench.ask("warm", prompt)
    bench.run()
    answer = bench.ask("scored", prompt, echo=True, max_tokens=max_tokens, prompt_logprobs=1, n=2)
    bench.ask("beside", [5] * 9)
    bench.run()
    assert answer.echo is not None
    assert answer.echo.logprobs is not None
    assert answer.echo.text == "echo this back, please"
    with torch.inference_mode():
        expected = torch.log_softmax(tiny_model()(torch.tensor([prompt])).logits[0], -1)
    assert answer.echo.logprobs[0] is None
    assert len(answer.echo.logprobs) == len(prompt)
    for position, entry in enumerate(answer.echo.logprobs[1:]):
        assert entry is not None
        assert entry.logprob == pytest.approx(float(expected[position, prompt[position + 1]]), abs=1e-4)
        assert entry.top[0].token_id == int(expected[position].argmax())
    assert answer.tokens(1) == answer.tokens(0) == solo(tiny_model(), prompt, max_tokens)
    assert isinstance(answer.end, Finished)
    assert answer.end.completion_tokens == 2 * max_tokens
    assert {delta.index for delta in answer.deltas if delta.finish_reason == "length"} == {0, 1}


def test_nothing_to_compute() -> None:
    bench = Bench()
    answer = bench.ask("silent", "abc", echo=True, max_tokens=0)
    bench.run()
    assert bench.engine.stats().steps == 0
    assert answer.echo is not None
    assert answer.echo.text == "abc"
    assert isinstance(answer.end, Finished)


def test_not_finite_logits_end_that_request_alone(
    adapters: dict[str, Path], oracles: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    """Finite weights, so the adapter loads, but too large: the products overflow."""
    bench = Bench(blocks=24, max_step_tokens=24, max_running=4)
    bench.load(write_adapter(tmp_path / "huge", bench.model, scale=1e30), "huge")
    bench.load(adapters["b"], "b")
    prompt = list(range(20))
    base = bench.ask("base", prompt)
    well = bench.ask("well", prompt, "b")
    sick = [bench.ask("sick-0", prompt, "huge", n=2)]
    bench.run()
    sick.append(bench.ask("sick-1", prompt, "huge", prompt_logprobs=0))
    sick.append(bench.ask("sick-2", prompt, "huge"))
    bench.run()
    for answer in sick:
        assert isinstance(answer.end, Failed)
        assert (answer.end.error.status, answer.end.error.code) == (500, "nan_logits")
        assert answer.started is not None
        assert answer.started.cached_tokens == 0, "what it computed must not be found again"
    assert well.tokens() == solo(oracles["b"], prompt, 8)
    assert base.tokens() == solo(oracles[""], prompt, 8)
    # The blocks it leaves behind are full of NaN: whoever gets them next must not notice.
    again = [bench.ask(f"again-{i}", [i] * 30) for i in range(4)]
    bench.run()
    for i, answer in enumerate(again):
        assert answer.tokens() == solo(oracles[""], [i] * 30, 8)


def test_device_time_is_shared_out_completely() -> None:
    bench = Bench(clock=ManualClock(tick=0.25))
    answers = [bench.ask(str(i), [i] * (5 * i + 1), max_tokens=3 + i) for i in range(5)]
    bench.run()
    ends = [answer.end for answer in answers]
    assert all(isinstance(end, Finished) for end in ends)
    shares = [end.device_s for end in ends if isinstance(end, Finished)]
    assert sum(shares) == pytest.approx(bench.engine.stats().busy_s)
    assert all(share > 0 for share in shares)


def test_who_leaves_pays_for_what_was_computed() -> None:
    clock = ManualClock(tick=0.25)
    bench = Bench(clock=clock, max_running=2)
    gone = bench.ask("gone", [1] * 20, max_tokens=30)
    kept = bench.ask("kept", [2] * 10, max_tokens=30)
    unheard = bench.ask("unheard", [3] * 10, max_tokens=30)
    for _ in range(5):
        bench.step()
    before = clock.now
    bench.abort("gone")
    bench.abort("unheard")
    bench.take(bench.engine.drain())
    assert isinstance(gone.end, Aborted)
    assert isinstance(unheard.end, Aborted)
    bench.run()
    shares = [answer.spent.device_s for answer in (gone, kept, unheard)]
    assert sum(shares) == pytest.approx(bench.engine.stats().busy_s)
    assert shares[0] > 0 and shares[2] == 0
    assert gone.spent.prompt_tokens == 20
    assert gone.spent.completion_tokens == len(gone.tokens()) == 5
    assert (unheard.spent.completion_tokens, unheard.spent.first_token_s) == (0, 0.0)
    assert before / 2 < unheard.spent.queue_s < clock.now, "it waited until its end"
    assert 0 < gone.spent.queue_s < gone.spent.first_token_s < before


def test_a_step_without_memory_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    bench = Bench(clock=clock)

    def fails(*_: Any) -> Any:
        clock.now += 1.0
        raise torch.OutOfMemoryError("none")

    with monkeypatch.context() as patch:
        patch.setattr(bench.engine._runner, "run", fails)
        answers = [bench.ask("long", [1] * 9), bench.ask("short", [1] * 3)]
        bench.run()
    assert [answer.spent.device_s for answer in answers] == pytest.approx([1.5, 0.5])
    stats = bench.engine.stats()
    assert stats.busy_s == pytest.approx(2.0)
    assert stats.steps == stats.prefill.n == 0, "nothing to learn from"


def test_sums_over_steps_give_the_line_they_lie_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    bench = Bench(clock=clock, max_step_tokens=32)
    run = bench.engine._runner.run

    def timed(work: list[Any], adapters: Any) -> Any:
        rows = sum(item.num_tokens for item in work)
        clock.now += 3.0 + 0.5 * rows if any(item.num_tokens > 1 for item in work) else 2.0 + 0.25 * rows
        return run(work, adapters)

    monkeypatch.setattr(bench.engine._runner, "run", timed)
    for round_ in range(3):
        for index in range(round_ + 1):
            bench.ask(f"{round_}-{index}", [index * 10 + round_] * (7 + 20 * index + 5 * round_), max_tokens=6)
            for _ in range(2):
                bench.step()
        bench.run()
    stats = bench.engine.stats()
    assert stats.steps > stats.decode.n + stats.prefill.n, "mixed steps count for neither"
    for sums, base, slope in ((stats.decode, 2.0, 0.25), (stats.prefill, 3.0, 0.5)):
        assert sums.n > 2
        b = (sums.n * sums.sum_xt - sums.sum_x * sums.sum_t) / (sums.n * sums.sum_xx - sums.sum_x**2)
        assert b == pytest.approx(slope)
        assert (sums.sum_t - b * sums.sum_x) / sums.n == pytest.approx(base)


def test_what_was_rehearsed_is_not_counted() -> None:
    bench = Bench()
    bench.ask("nobody", [1] * 20, max_tokens=3)
    bench.run()
    bench.engine.start_counting()
    stats = bench.engine.stats()
    assert (stats.steps, stats.busy_s, stats.prefix_query_tokens) == (0, 0.0, 0)
    assert stats.decode.n == stats.prefill.n == 0
    somebody = bench.ask("somebody", [1] * 20, max_tokens=3)
    bench.run()
    assert somebody.spent.device_s == pytest.approx(bench.engine.stats().busy_s)


def test_memory_of_keys_and_values_is_what_was_written_to() -> None:
    bench = Bench(blocks=64)
    assert bench.engine.stats().kv_bytes == 0
    for name in ("first", "again"):
        bench.ask(name, [1] * 20, max_tokens=4)
        bench.run()
        # Of three blocks the prefix cache keeps two; the third is used again.
        assert bench.engine.stats().kv_bytes == 3 * BLOCK * KV_TOKEN_BYTES
    bench.ask("long", [2] * 60, max_tokens=4)
    bench.run()
    assert bench.engine.stats().kv_bytes == 10 * BLOCK * KV_TOKEN_BYTES


# --- deadlines --------------------------------------------------------------------------------------------------


def test_who_has_not_begun_by_the_deadline_is_told_so() -> None:
    clock = ManualClock()
    bench = Bench(clock=clock, max_running=1)
    running = bench.ask("running", [1] * 3, max_tokens=20, deadline=10.0)
    bench.step()
    late = bench.ask("late", [2] * 3, n=2, deadline=10.0)
    patient = bench.ask("patient", [3] * 3)
    in_time = bench.ask("in time", [4] * 3, deadline=30.0)
    clock.now = 10.0
    bench.take(bench.engine.drain())
    assert late.end is None, "not yet"
    clock.now = 12.5
    bench.take(bench.engine.drain())
    assert isinstance(late.end, Failed)
    assert (late.end.error.status, late.end.error.code) == (503, "deadline_exceeded")
    assert "12.5 s" in late.end.error.message and "try again" in late.end.error.message
    assert late.spent == Spent(prompt_tokens=3, queue_s=12.5)
    assert running.end is None, "it has begun, so it goes on"
    assert bench.engine.stats().waiting == 2
    bench.run()
    assert len(running.tokens()) == 20
    assert isinstance(in_time.end, Finished)
    assert isinstance(patient.end, Finished), "without a deadline there is none to miss"


def test_one_that_began_and_was_preempted_has_met_its_deadline() -> None:
    clock = ManualClock()
    bench = Bench(clock=clock, blocks=8, max_running=3)
    answers = [bench.ask(str(i), [i] * 14, max_tokens=30, deadline=1.0) for i in range(2)]
    while bench.engine.stats().preemptions == 0:
        bench.step()
    clock.now = 100.0
    bench.run()
    assert [len(answer.tokens()) for answer in answers] == [30, 30]


def test_the_earliest_deadline_begins_first() -> None:
    clock = ManualClock()
    bench = Bench(clock=clock, max_running=1)
    bench.ask("running", [1] * 3, max_tokens=2)
    bench.step()
    for name, deadline in (("none", None), ("far", float("inf")), ("near", 7.0), ("nearer", 5.0), ("also", 7.0)):
        bench.ask(name, [2] * 3, max_tokens=2, deadline=deadline)
    order: list[str] = []
    while bench.engine.has_work:
        bench.step()
        order += [name for name, answer in bench.answers.items() if answer.started and name not in order]
    assert order == ["running", "nearer", "near", "also", "none", "far"]


def test_a_stream_of_urgent_requests_does_not_starve_a_patient_one() -> None:
    clock = ManualClock()
    bench = Bench(clock=clock, max_running=1)
    patient = bench.ask("patient", [1] * 3, max_tokens=2)
    for count in range(100):
        bench.ask(f"urgent-{count}", [2] * 3, max_tokens=2, deadline=clock.now + 10.0)
        clock.now += 2.0
        bench.step()
        if patient.started is not None:
            break
    assert patient.started is not None
    assert clock.now == pytest.approx(PATIENCE_S, abs=12.0)


def test_a_short_step_takes_a_part_of_the_prompt() -> None:
    bench = Bench(max_running=4, max_step_tokens=64)
    prompt = list(range(50))
    answer = bench.ask("long", prompt)
    bench.take(bench.engine.step(max_tokens=20))
    bench.take(bench.engine.step(max_tokens=20))
    assert not answer.deltas
    bench.take(bench.engine.step(max_tokens=20))
    assert len(answer.deltas) == 1
    bench.run()
    assert answer.tokens() == solo(tiny_model(), prompt, 8)


def test_an_adapter_that_ends_while_it_is_asked_for_again(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", tiny_model(), rank=2)
    bench = Bench(blocks=64)
    bench.load(path, "a")
    bench.ask("last", [1, 2, 3], "a", max_tokens=3)
    bench.step()
    bench.engine.unload_adapter("a")
    read = bench.engine.read_adapter(LoadAdapter("a", str(path)))  # by the loader: it is still there
    bench.run()  # meanwhile its last request ends, and it is freed
    assert isinstance(bench.engine.admit(read), Loaded)
    bench.ask("again", [1, 2, 3], "a", max_tokens=3)
    bench.run()
