"""Steps that are launched before the last one is read change nothing for anybody: the messages are those without.

On the CPU, so that many random runs cost little: graphs that forward eagerly with tokens the host has not been told,
into one buffer that the next step overwrites, and a sampler that has chosen when its step is launched.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from serverlesslora.engine.engine import Engine
from serverlesslora.engine.lora import Adapter
from serverlesslora.engine.runner import Runner
from serverlesslora.engine.sampler import UNUSABLE, Sampled, Sampler, SampleRow, is_adjusted
from serverlesslora.engine.scheduler import Work
from serverlesslora.engine.sequence import UNKNOWN
from serverlesslora.engine.sequence import Sequence as Tokens
from serverlesslora_ipc.messages import Aborted, Failed, Finished
from tests.fakes import VOCAB, ManualClock, tiny_model, write_adapter
from tests.test_engine import BLOCK, Answer, Bench

DAMAGED = 13  # requests of this seed meet logits that are not finite ...
DAMAGED_OUTPUT = 4  # ... at this place of their output


class Graphs:
    """What `DecodeGraphs` does, without being fast; `shares` of the steps fit."""

    state = "on"

    def __init__(self, runner: Runner, rng: random.Random, share: float) -> None:
        self._runner = runner
        self._rng = rng
        self._share = share
        self._output = torch.zeros(64, VOCAB)
        self.num_ahead = 0

    def fits(self, work: Sequence[Work], adapters: Mapping[str, Adapter]) -> bool:
        assert all(item.sequence.adapter in adapters for item in work if item.sequence.adapter)
        decodes = all(item.samples and item.num_tokens == 1 for item in work)
        return decodes and self._rng.random() < self._share

    @torch.inference_mode()
    def run(self, work: Sequence[Work], adapters: Mapping[str, Adapter], *, tokens: Tensor | None = None) -> Tensor:
        if tokens is not None:
            self.num_ahead += 1
            for item, token in zip(work, tokens.clamp(min=0).tolist(), strict=True):
                assert item.sequence.token_ids[item.start :] == [UNKNOWN]
                item.sequence.token_ids[item.start] = token
        assert not any(UNKNOWN in item.sequence.token_ids for item in work)
        logits = self._runner._forward(list(work), list(range(len(work))), [1] * len(work), adapters)
        if tokens is not None:
            for item in work:
                item.sequence.token_ids[item.start] = UNKNOWN
        self._output.fill_(torch.nan)
        self._output[: len(work)] = logits
        return self._output[: len(work)]


class Busy:
    """A device on which nothing but steps takes time, one after the other; it passes when a step is waited for."""

    def __init__(self, engine: Engine, clock: ManualClock) -> None:
        self._forward, self._collect = engine._runner._forward, engine._collect
        self._clock = clock
        self._launched: deque[float] = deque()
        self.seconds = 0.0
        engine._runner._forward = self.forward  # type: ignore[method-assign, assignment]
        engine._collect = self.collect  # type: ignore[method-assign, assignment]

    def forward(self, work: list[Work], *args: Any) -> Tensor:
        cost_s = 1.0 + 0.125 * sum(item.num_tokens for item in work)
        self._launched.append(cost_s)
        self.seconds += cost_s
        return self._forward(work, *args)

    def collect(self, *args: Any) -> None:
        self._clock.now += self._launched.popleft()
        self._collect(*args)


class Damaging(Sampler):
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        sampled = super().sample(logits, rows)
        return [UNUSABLE if _is_damaged(row) else token for row, token in zip(rows, sampled, strict=True)]


def _is_damaged(row: SampleRow) -> bool:
    return row.params.seed == DAMAGED and row.position == len(row.prompt_ids) + DAMAGED_OUTPUT


class Chosen(NamedTuple):
    tokens: Tensor

    def wait(self) -> list[Sampled]:
        return [Sampled(token) if token >= 0 else UNUSABLE for token in self.tokens.tolist()]


class Ahead(Damaging):
    def begin(self, logits: Tensor, rows: Sequence[SampleRow]) -> Any:
        if not self.is_on_device(rows):
            return super().begin(logits, rows)
        return Chosen(torch.tensor([token.token_id for token in self.sample(logits, rows)]))

    def is_on_device(self, rows: Sequence[SampleRow]) -> bool:
        return not any(row.params.logprobs is not None or is_adjusted(row) for row in rows)


class Ask(NamedTuple):
    name: str
    prompt: list[int]
    adapter: str | None
    options: dict[str, Any]


class Do(NamedTuple):
    what: str  # "abort", "unload" or "load"
    name: str


Plan = list[tuple[int, Ask | Do]]  # how many steps later


def a_plan(rng: random.Random) -> Plan:
    plan: Plan = []
    prefixes = [[rng.randrange(256) for _ in range(2 * BLOCK)] for _ in range(2)]
    loaded = {"a": True, "b": True}
    names: list[str] = []
    for index in range(rng.randint(4, 9)):
        prompt = rng.choice(prefixes)[: rng.randint(1, 16)] + [rng.randrange(256) for _ in range(rng.randint(1, 6))]
        options: dict[str, Any] = {"max_tokens": rng.choice([0, 1, 2, 9, 20, 30]), "n": rng.choice([1, 1, 1, 2, 3])}
        if rng.random() < 0.3:
            options |= {"temperature": 1.0, "seed": rng.randrange(10)}
        elif rng.random() < 0.15:
            options |= {"temperature": 1.0, "seed": DAMAGED}
        if rng.random() < 0.3:
            options |= {"stop_token_ids": tuple(rng.sample(range(256), 40)), "min_tokens": rng.randint(0, 6)}
            options["min_tokens"] = min(options["min_tokens"], options["max_tokens"])
        if rng.random() < 0.3:
            options["stop"] = tuple(chr(rng.randrange(32, 127)) for _ in range(25))
        if rng.random() < 0.15:
            options |= rng.choice([{"logprobs": 2}, {"presence_penalty": 0.7}, {"prompt_logprobs": 1, "echo": True}])
        adapter = rng.choice([None, *(name for name, there in loaded.items() if there)])
        plan.append((rng.choice([0, 0, 1, 3, 8]), Ask(f"r{index}", prompt, adapter, options)))
        names.append(f"r{index}")
        if rng.random() < 0.3:
            plan.append((rng.randint(0, 4), Do("abort", rng.choice(names))))
        if rng.random() < 0.3:
            name = rng.choice("ab")
            plan.append((rng.randint(0, 3), Do("unload" if loaded[name] else "load", name)))
            loaded[name] = not loaded[name]
    return plan


class Outcome(NamedTuple):
    answers: dict[str, Answer]
    preemptions: int
    num_ahead: int


def carry_out(plan: Plan, adapters: dict[str, Path], graphs_rng: random.Random | None) -> Outcome:
    clock = ManualClock()
    bench = Bench(blocks=8, max_running=3, max_step_tokens=24, clock=clock)
    engine = bench.engine
    busy = Busy(engine, clock)
    engine._sampler = Damaging()
    graphs: Graphs | None = None
    if graphs_rng is not None:
        graphs = Graphs(engine._runner, graphs_rng, graphs_rng.choice([1.0, 0.9]))
        engine._runner.graphs = graphs  # type: ignore[assignment]
        engine._sampler = Ahead()
    for name, path in adapters.items():
        bench.load(path, name)
    answers: dict[str, Answer] = {}
    for steps, order in plan:
        for _ in range(steps):
            step(bench)
        match order:
            case Ask(name, prompt, adapter, options):
                answers[name] = bench.ask(name, prompt, adapter, **options)
            case Do("abort", name):
                bench.abort(name)
            case Do("unload", name):
                engine.unload_adapter(name)
            case Do("load", name):
                bench.load(adapters[name], name)
    while engine.has_work:
        step(bench)
    stats = engine.stats()
    assert stats.kv_used_blocks == stats.running == stats.waiting == 0
    assert sum(answer.spent.device_s for answer in answers.values()) == pytest.approx(stats.busy_s)
    assert stats.busy_s == pytest.approx(busy.seconds), "every second of the device, and no other"
    for answer in answers.values():
        counted = sum(len(delta.token_ids) for delta in answer.deltas)
        assert answer.spent.completion_tokens == counted
        assert (answer.spent.first_token_s > 0) == (counted > 0)
    engine.close()
    return Outcome(answers, stats.preemptions, graphs.num_ahead if graphs else 0)


def step(bench: Bench) -> None:
    bench.step()
    engine = bench.engine
    for sequence in engine._request_of:
        assert UNKNOWN not in sequence.token_ids, "what was launched is known once the step before it was read"
        known = Tokens(0, sequence.adapter, sequence.token_ids, sequence.num_prompt)
        for index, link in enumerate(sequence.chain):
            assert engine._blocks._key(known, index).chain == link, "the key of a block that was not known"
            assert (index + 1) * BLOCK <= sequence.num_tokens


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    return {
        name: write_adapter(root / name, model, rank=rank, seed=rank, scale=0.4) for name, rank in (("a", 2), ("b", 3))
    }


def facts(answer: Answer) -> dict[str, Any]:
    """Everything but times and luck with the prefix cache; numbers that depend on a batch to a few digits."""
    deltas: dict[int, list[Any]] = {}
    for delta in answer.deltas:
        logprobs = [round(entry.logprob, 3) for entry in delta.logprobs or ()]
        deltas.setdefault(delta.index, []).append(
            (delta.text, delta.token_ids, logprobs, delta.finish_reason, delta.stop_reason)
        )
    found: dict[str, Any] = {"deltas": deltas, "echo": answer.echo and (answer.echo.text, answer.echo.token_ids)}
    if isinstance(answer.end, Finished):
        found["counts"] = (answer.end.prompt_tokens, answer.end.completion_tokens)
    elif isinstance(answer.end, Failed):
        found["error"] = answer.end.error
    return found


def is_beginning(short: dict[int, list[Any]], long: dict[int, list[Any]]) -> bool:
    return all(part == long.get(index, [])[: len(part)] for index, part in short.items())


def test_launching_ahead_changes_nothing_for_anybody(adapters: dict[str, Path]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        plan = a_plan(random.Random(seed))
        plain = carry_out(plan, adapters, None)
        ahead = carry_out(plan, adapters, random.Random(seed))
        aborted = {order.name for _, order in plan if isinstance(order, Do) and order.what == "abort"}
        for name, answer in ahead.answers.items():
            ours, expected = facts(answer), facts(plain.answers[name])
            if "error" in ours or "error" in expected:
                # How far the other choices of a request have come when one fails depends on who ran beside them.
                seen["failed"] += 1
            if name in aborted or "error" in ours or "error" in expected:
                one, other = ours["deltas"], expected["deltas"]
                indices = one.keys() & other.keys()
                for index in indices:
                    count = min(len(one[index]), len(other[index]))
                    assert one[index][:count] == other[index][:count], (seed, name)
            if name in aborted:
                seen["aborted"] += isinstance(answer.end, Aborted)
                continue
            if "error" in ours or "error" in expected:
                assert ours.get("error") == expected.get("error"), (seed, name)
                continue
            assert ours == expected, (seed, name)
            assert isinstance(answer.end, Finished)
            seen["finished"] += 1
            seen["stopped"] += any(delta.finish_reason == "stop" for delta in answer.deltas)
            seen["choices"] += len({delta.index for delta in answer.deltas}) > 1
        seen["preempted"] += ahead.preemptions > 0
        seen["ahead"] += ahead.num_ahead
    missing = {"failed", "aborted", "finished", "stopped", "choices", "preempted", "ahead"} - {
        what for what, count in seen.items() if count >= 5
    }
    assert not missing, seen


def test_who_arrives_is_begun_after_the_step_that_is_on_its_way() -> None:
    bench = Bench(blocks=64, max_running=2)
    bench.engine._runner.graphs = Graphs(bench.engine._runner, random.Random(0), 1.0)  # type: ignore[assignment]
    bench.engine._sampler = Ahead()
    bench.ask("long", [1, 2, 3], max_tokens=30)
    for _ in range(4):
        bench.step()
    assert bench.engine._ahead is not None
    second = bench.ask("second", [4, 5, 6], max_tokens=30)
    bench.step()
    assert bench.engine._ahead is None, "a place is free for who waits"
    bench.step()
    assert second.started is not None
    third = bench.ask("third", [7, 8, 9], max_tokens=2)
    bench.step()
    assert bench.engine._ahead is not None, "no place is free, so nothing is lost by going on"
    bench.run()
    assert third.started is not None


def test_the_step_on_its_way_ends_with_the_last_request_even_if_that_was_too_late() -> None:
    clock = ManualClock()
    bench = Bench(blocks=64, max_running=1, clock=clock)
    engine = bench.engine
    engine._runner.graphs = Graphs(engine._runner, random.Random(0), 1.0)  # type: ignore[assignment]
    engine._sampler = Ahead()
    bench.ask("running", [1, 2, 3], max_tokens=30)
    for _ in range(3):
        bench.step()
    bench.ask("waiting", [4, 5, 6], max_tokens=3, deadline=clock.now + 2.0)
    bench.step()
    assert engine._ahead is not None
    clock.now += 3
    engine.abort("running")
    assert {type(message) for message in engine.drain()} == {Aborted, Failed}
    assert not engine.has_work
    engine.check()
