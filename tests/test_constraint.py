"""Outputs match their grammar whatever the model says, the tokenizer is and the batch does; others notice nothing."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from serverlesslora import demo
from serverlesslora.engine.constraint import CompiledGrammar, Grammars
from serverlesslora.engine.cuda.device import CudaDevice
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.engine.sampler import Sampler, SampleRow
from serverlesslora.errors import InvalidRequest, ServerlessLoraError, Unavailable
from serverlesslora.worker.compiling import MAX_LEFT_BEHIND, Compiling, GrammarRead
from serverlesslora_ipc.messages import (
    ChatPrompt,
    Failed,
    Finished,
    Generate,
    Grammar,
    SamplingParams,
    TextPrompt,
)
from tests.fakes import EOS, byte_tokenizer, tiny_model
from tests.test_detokenize import KINDS
from tests.test_engine import Answer, Bench, solo

CODECS = {
    "demo": TextCodec.from_directory(demo.backbone_path(), context_length=512),
    "bytes": TextCodec(byte_tokenizer()),
    "several_eos": TextCodec(byte_tokenizer(), (EOS + 1,)),
    "byte_level": TextCodec(KINDS["byte_level"]),
    "byte_fallback": TextCodec(KINDS["fallback"], vocab_size=len(KINDS["fallback"]) + 5),
}
ANY: dict[str, Any] = {"temperature": 1.0, "ignore_eos": False, "max_tokens": 200}


def grammar(kind: Any, text: Any) -> Grammar:
    return Grammar(kind, text if isinstance(text, str) else json.dumps(text), "guided_json")


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars()


def bounded(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: list[Any] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -20, "maximum": 300},
    {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 7},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 999},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"type": "string", "maxLength": 5},
    {"type": "string", "minLength": 3, "maxLength": 4},
    {"type": "string", "pattern": "^[a-f]{2,3}-[0-9]$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"enum": ["red", "grün", 3, None, [1, 2]]},
    {"const": {"a": [1, "x"]}},
    {"type": ["boolean", "null"]},
    {"anyOf": [{"type": "boolean"}, {"const": "none"}]},
    {"oneOf": [bounded(kind={"const": "a"}), bounded(kind={"const": "b"}, x={"type": "boolean"})]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False, "minItems": 2},
    bounded(),
    bounded(name={"type": "string", "maxLength": 4}, age={"type": "integer", "minimum": 0, "maximum": 99}),
    bounded(inner=bounded(deep=bounded(flag={"type": "boolean"}))),
    bounded(items={"type": "array", "maxItems": 2, "items": bounded(x={"enum": [1, 2]})}),
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False},
    bounded() | {"patternProperties": {"^x[0-9]$": {"type": "null"}}, "maxProperties": 1},
    {"$ref": "#/$defs/flag", "$defs": {"flag": {"type": "boolean"}}},
    {"$defs": {"n": {"anyOf": [{"type": "null"}, bounded(next={"$ref": "#/$defs/n"})]}}, "$ref": "#/$defs/n"},
    {"title": "T", "description": "d", "type": "string", "enum": ["a", "b"], "examples": ["a"], "$comment": "c"},
    bounded(text={"type": "string", "pattern": "^(yes|no)$"}, when={"type": "string", "format": "time"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(blocks=512, max_running=8)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_random_model_writes_what_the_schema_says(bench: Bench, temperature: float) -> None:
    asked = {
        f"{place}-{temperature}": (schema, bench.ask(
            f"{place}-{temperature}", f"number {place}", grammar=grammar("json_schema", schema), seed=place,
            **(ANY | {"temperature": temperature, "logit_bias": dict.fromkeys((9, 10, 13, 32), -100.0)}),
        ))
        for place, schema in enumerate(SCHEMAS)
    }  # fmt: skip
    bench.run()
    complete = 0
    for schema, answer in asked.values():
        assert isinstance(answer.end, Finished), answer.end
        if answer.deltas[-1].finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text()), schema)
            complete += 1
        else:
            assert len(answer.tokens()) == 200
    assert complete >= len(SCHEMAS) - 1  # the list that goes on may go on


EXPRESSIONS = ["a|ab|abc", "(ab)*c", "[a-c]{2}b?", "a.c", "", "(a|b)*abb", "é|ab", "[^a]b", "a{0,3}"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_masks_are_those_of_brute_force(grammars: Grammars, expression: str) -> None:
    """Over a vocabulary with tokens of several bytes: allowed is whatever some match begins with."""
    words = ["a", "b", "c", "ab", "bb", "abc", "cab", "é", "x", ""]
    text = tiny_codec(words[:-1])
    size = text.vocab_size
    matches = {
        each
        for length in range(7)
        for each in map("".join, itertools.product("abcxé", repeat=length))
        if re.fullmatch(expression, each)
    }
    compiled = grammars.compile(Grammar("regex", expression), text)
    rng = random.Random(expression)
    for _ in range(20):
        constraint, said = compiled.begin(), ""
        for _ in range(4):
            allowed = set(np.flatnonzero(constraint.allowed(size + 3)).tolist())
            ends = {size - 1} if said in matches else set()
            # Longer matches than were enumerated begin like shorter ones in these expressions.
            likely = {i for i, word in enumerate(words[:-1]) if any(m.startswith(said + word) for m in matches)}
            assert allowed == likely | ends, said
            chosen = rng.choice(sorted(allowed))
            is_complete = constraint.advance(chosen)
            if chosen == size - 1:
                break
            said += words[chosen]
            assert is_complete <= (said in matches)
            if is_complete or len(said) > 1:
                break


def tiny_codec(words: list[str]) -> TextCodec:
    tokenizer = Tokenizer(models.WordLevel({**{word: i for i, word in enumerate(words)}, "<eos>": len(words)}, "x"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))


@pytest.mark.parametrize("name", CODECS)
def test_every_kind_of_tokenizer(grammars: Grammars, name: str) -> None:
    """Random walks: the text that the detokenizer shows is what was allowed."""
    text = CODECS[name]
    assert text.vocabulary.spellings(text.vocab_size + 2) == [
        text.vocabulary.utf8(token_id) for token_id in range(text.vocab_size + 2)
    ]
    schema = bounded(a={"type": "string", "maxLength": 6}, b={"enum": ["hello", "日本"]})
    compiled = grammars.compile(grammar("json_schema", schema), text)
    rng = random.Random(name)
    for _ in range(15):
        constraint, detokenizer, said = compiled.begin(), text.detokenizer([0]), ""
        for _ in range(400):
            allowed = np.flatnonzero(constraint.allowed(text.vocab_size)).tolist()
            assert allowed
            assert not set(allowed) & set(text.eos_token_ids)
            likely = [i for i in allowed if not text.vocabulary.utf8(i).isspace()]
            token_id = rng.choice(likely or allowed)
            said += detokenizer.push(token_id)
            if constraint.advance(token_id):
                break
        jsonschema.validate(json.loads(said + detokenizer.flush()), schema)


def test_every_eos_may_end_it_and_no_other_special_token(grammars: Grammars) -> None:
    text = CODECS["several_eos"]
    assert text.eos_token_ids == (EOS, EOS + 1)
    constraint = grammars.compile(Grammar("regex", "a*"), text).begin()
    assert set(np.flatnonzero(constraint.allowed(300)).tolist()) == {ord("a"), EOS, EOS + 1}
    assert set(np.flatnonzero(constraint.allowed(300, banned=(EOS, EOS + 1))).tolist()) == {ord("a")}
    assert set(np.flatnonzero(constraint.allowed(EOS)).tolist()) == {ord("a")}
    nothing = grammars.compile(Grammar("choice", '[""]'), text).begin(shunned=(EOS, EOS + 1))
    assert set(np.flatnonzero(nothing.allowed(300, banned=(EOS,))).tolist()) == {EOS, EOS + 1}


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", {"not": {}}, "not"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ("json_schema", {"type": "string", "format": "nope"}, "nope"),
        ("json_schema", {"type": "strange"}, "strange"),
        ("json_schema", {"$ref": "#/nowhere"}, "nowhere"),
        ("json_schema", {"$ref": "http://127.0.0.1:1/x"}, "127.0.0.1"),
        ("json_schema", "false", "matches false"),
        ("json_schema", {"enum": []}, "nsatisfiable"),
        ("json_schema", {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "matches it"),
        ("json_schema", {"allOf": [{"type": "integer", "multipleOf": p} for p in (97, 101, 103)]}, "multipleOf"),
        ("json_schema", {"type": "integer", "multipleOf": 999_983}, "multipleOf"),
        ("json_schema", '{"multipleOf": 1e-9999999}', "multipleOf"),
        ("lark", 'start: %json {"type": "integer", "multipleOf": 999983}', "multipleOf"),
        ("lark", 'nope: "x"', "start"),
        ("lark", '{"grammars": []}', "Lark"),
        ("lark", "start: " + " ".join(f"r{i}" for i in range(5000)), "r0"),
        ("gbnf", "root ::= (", "Expected"),
        ("gbnf", "root ::= " + "(" * 5000, ""),
        ("regex", "(" * 300 + "a" + ")" * 300, ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    grammars: Grammars, kind: str, text: Any, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammars.compile(grammar(kind, text), CODECS["bytes"])
    assert reason in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.param == "guided_json"
    assert "non-verbose" not in caught.value.message


def test_kinds_of_grammars(bench: Bench) -> None:
    texts = {
        ("choice", '["a\\nb", "ab\\"", "/x{2}"]'): {"a\nb", 'ab"', "/x{2}"},
        ("gbnf", 'root ::= ("x" | "y") [0-9]'): {f"{x}{d}" for x in "xy" for d in range(10)},
        ("lark", 'start: "x" NUM\nNUM: /[0-2]{2}/'): {f"x{a}{b}" for a in range(3) for b in range(3)},
        ("regex", "a{2}|b"): {"aa", "b"},
    }
    for place, ((kind, text), expected) in enumerate(texts.items()):
        answer = bench.ask(f"k{place}", "hi", n=3, grammar=grammar(kind, text), **ANY)
        bench.run()
        assert {answer.text(index) for index in range(3)} <= expected


def reasons(answer: Answer) -> list[Any]:
    return [(d.index, d.finish_reason, d.stop_reason) for d in answer.deltas if d.finish_reason]


def test_choices_are_independent_and_the_same_in_any_batch(bench: Bench) -> None:
    digits = grammar("regex", "[a-z]{1,12}!")
    alone = bench.ask("alone", "hi", n=3, seed=4, grammar=digits, **ANY)
    bench.run()
    assert len({alone.text(index) for index in range(3)}) > 1
    again = bench.ask("again", "hi", n=3, seed=4, grammar=digits, **ANY)
    other = bench.ask("other", "there", grammar=grammar("json_schema", SCHEMAS[22]), **ANY)
    bench.run()
    assert [again.tokens(index) for index in range(3)] == [alone.tokens(index) for index in range(3)]
    assert isinstance(other.end, Finished)


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 3}], ids=["greedy", "drawn"])
def test_neighbours_of_a_constrained_row_are_unchanged(more: dict[str, Any]) -> None:
    def run(*, constrained: bool) -> list[Answer]:
        bench = Bench(blocks=64)
        answers = [bench.ask(f"free{i}", f"prompt {i}", seed=i, max_tokens=12, **more) for i in range(3)]
        if constrained:
            bench.ask("bound", "prompt", grammar=grammar("regex", "[a-c]{10}"), **ANY)
        bench.run()
        return answers

    for with_it, without in zip(run(constrained=True), run(constrained=False), strict=True):
        assert with_it.tokens() == without.tokens()
        assert with_it.text() == without.text()


def test_logprobs_of_a_constrained_row_are_of_the_raw_model() -> None:
    bench, model = Bench(), tiny_model()
    answer = bench.ask("x", "prompt", grammar=grammar("regex", "[a-c]{3}"), logprobs=0, max_tokens=3)
    bench.run()
    prompt = list(b"prompt")
    for delta in answer.deltas:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        (token_id,) = delta.token_ids
        assert chr(token_id) in "abc"
        assert token_id == max(b"abc", key=lambda i: float(logits[i]))
        assert delta.logprobs is not None
        assert delta.logprobs[0].logprob == pytest.approx(float(logits.log_softmax(-1)[token_id]), abs=1e-4)
        prompt.append(token_id)


def test_preemption_changes_nothing() -> None:
    bound = grammar("regex", "[a-d]{40}")
    calm, busy = Bench(blocks=200), Bench(blocks=200)
    for bench in (calm, busy):
        for place in range(3):
            bench.ask(f"{place}", f"prompt {place}", seed=place, grammar=bound, **ANY)
            bench.ask(f"free{place}", f"prompt {place}", seed=place, max_tokens=30)
    rng = random.Random(1)
    for _ in range(30):
        busy.step()
        busy.engine._scheduler._preempt(rng.choice(busy.engine._scheduler.running))
    calm.run()
    busy.run()
    for name, answer in calm.answers.items():
        assert busy.answers[name].tokens() == answer.tokens()
        if "free" not in name:
            assert re.fullmatch("[a-d]{40}", answer.text())


@pytest.mark.parametrize(
    ("params", "text", "reason"),
    [
        ({}, "ab", "stop"),
        ({"ignore_eos": True}, "ab", "stop"),
        ({"min_tokens": 7}, "ab", "stop"),
        ({"max_tokens": 1}, "a", "length"),
        ({"max_tokens": 2}, "ab", "stop"),
        ({"stop": ("b",)}, "a", "stop"),
        ({"stop": ("bc",)}, "ab", "stop"),
        ({"stop": ("b",), "include_stop_str_in_output": True}, "ab", "stop"),
        ({"stop_token_ids": (ord("a"),)}, "", "stop"),
        ({"logit_bias": {ord("a"): -100.0}}, "ab", "stop"),
    ],
    ids=str,
)
def test_a_complete_output_ends_at_once(bench: Bench, params: dict[str, Any], text: str, reason: str) -> None:
    answer = bench.ask(
        f"end {params}", "hi", grammar=grammar("choice", ["ab"]), **(ANY | {"temperature": 0.0} | params)
    )
    bench.run()
    assert answer.text() == text
    assert len(answer.tokens()) <= len("ab")
    assert [each[1] for each in reasons(answer)] == [reason]


def test_eos_where_it_is_allowed_and_where_it_is_not_wanted(bench: Bench) -> None:
    bias = {"logit_bias": {EOS: 100.0}}
    for name, params, text in (
        ("taken", {}, "a"),
        ("ignored", {"ignore_eos": True}, "aaaa"),
        ("too early", {"min_tokens": 3}, "aaa"),
    ):
        answer = bench.ask(name, "hi", grammar=grammar("regex", "a{1,4}"), **(ANY | bias | params))
        bench.run()
        assert answer.text() == text
        assert reasons(answer) == [(0, "stop", None)]


def test_reasoning_is_free_and_the_answer_is_not() -> None:
    template = "{{ messages[0].content }}<think>\n"
    bench = Bench(blocks=512)
    bench.engine._text = TextCodec(byte_tokenizer(), template=template)
    thought = list(b"hm </think>")
    message = Generate(
        "x", None, ChatPrompt([{"role": "user", "content": "q"}]),
        SamplingParams(max_tokens=40, temperature=0.0, grammar=grammar("regex", "[xy]{3}")),
    )  # fmt: skip
    bench.engine.submit(message)
    answer = bench.answers["x"] = Answer()
    (request,) = bench.engine._requests.values()
    (choice,) = request.choices.values()
    assert choice.constraint is not None
    sample = Sampler.sample

    def scripted(self: Sampler, logits: torch.Tensor, rows: list[SampleRow]) -> Any:
        place = rows[0].position - len(request.prompt_ids)
        if place < len(thought):
            logits = logits.clone()
            logits[0, thought[place]] = 1e4  # the model's own will, which nothing must forbid yet
        return sample(self, logits, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", scripted)
        bench.run()
    assert answer.started is not None
    assert answer.started.reasoning_open
    assert re.fullmatch(r"hm </think>[xy]{3}", answer.text())
    assert reasons(answer) == [(0, "stop", None)]


def test_the_emulated_device(device: CudaDevice) -> None:
    bench = Bench(device=device, model=tiny_model().to(device.torch_device), max_running=4)
    bench.engine.capture()
    bound = bench.ask("bound", "prompt", grammar=grammar("regex", "[a-d]{6}"), max_tokens=20)
    free = bench.ask("free", "prompt", max_tokens=8)
    bench.run()
    assert re.fullmatch("[a-d]{6}", bound.text())
    assert free.tokens() == solo(tiny_model(), list(b"prompt"), 8)


def test_a_grammar_that_breaks_under_way_ends_its_request_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = bench.ask("breaks", "hi", grammar=grammar("regex", "[a-d]{60}"), **ANY)
    free = bench.ask("goes on", "hi", max_tokens=20)
    for _ in range(5):
        bench.step()
    (choice,) = bench.engine._requests["breaks"].choices.values()
    assert choice.constraint is not None
    choice.constraint._matcher.consume_token(ord("!"))
    bench.run()
    assert isinstance(bound.end, Failed)
    assert bound.end.error.status == 400
    assert bound.end.error.param == "guided_json"
    assert isinstance(free.end, Finished)


def test_what_was_compiled_is_kept_for_a_while() -> None:
    grammars, text = Grammars(), CODECS["bytes"]
    first = grammars.compile(Grammar("regex", "a", "guided_regex"), text)
    again = grammars.compile(Grammar("regex", "a", "structured_outputs.regex"), text)
    assert again.matcher is first.matcher
    assert again.grammar.param == "structured_outputs.regex"
    assert grammars.compile(Grammar("regex", "a"), CODECS["several_eos"]).matcher is not first.matcher
    for number in range(30):
        grammars.compile(Grammar("regex", f"a{number}"), text)
    assert len(grammars._compiled) <= 16
    assert grammars.compile(Grammar("regex", "a"), text).matcher is not first.matcher


# --- beside the running steps ------------------------------------------------------------------------------------


def test_what_takes_too_long_is_refused_and_left_behind() -> None:
    told: list[GrammarRead] = []
    release = threading.Event()
    compiling = Compiling(told.append, limit_s=0.05)
    message = Generate("x", None, TextPrompt("p"), SamplingParams(grammar=grammar("regex", "a")))
    compiled = Grammars().compile(grammar("regex", "a"), CODECS["bytes"])

    def hang() -> CompiledGrammar:
        release.wait(60)
        return compiled

    def crash() -> CompiledGrammar:
        raise BaseException("panic")

    def attempt(compile: Any) -> CompiledGrammar | ServerlessLoraError:
        compiling.put(message, compile)
        compiling.work()
        assert told[-1].message is message
        return told[-1].grammar

    try:
        for _ in range(MAX_LEFT_BEHIND):
            slow = attempt(hang)
            assert isinstance(slow, InvalidRequest)
            assert "longer than" in slow.message
            assert slow.param == "guided_json"
        assert isinstance(attempt(lambda: compiled), Unavailable)
    finally:
        release.set()
    for thread in compiling._left_behind:
        thread.join(10)
    assert attempt(lambda: compiled) is compiled
    broken = attempt(crash)
    assert isinstance(broken, InvalidRequest)
    assert "panic" in broken.message
