"""Prompts to ids: limits, hostile input, chat templates, and adapters with tokenizer files of their own."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from serverlesslora.engine import chat_template
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.errors import AdapterInvalid, ContextLengthExceeded, InvalidRequest
from serverlesslora_ipc.messages import ChatPrompt, Prompt, TextPrompt, TokensPrompt

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def byte_tokenizer(extra: tuple[str, ...] = (), eos: str = "</s>") -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *extra])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)


def codec(template: Any = TEMPLATE, **options: Any) -> TextCodec:
    return TextCodec(byte_tokenizer(), (257,), **{"context_length": 1000, **options}, template=template)


def rendered(messages: list[dict[str, Any]], template: Any = TEMPLATE, **options: Any) -> str:
    text = codec(template)
    return str(text.tokenizer.decode(text.encode(ChatPrompt(messages=messages, **options))))


def refusal(text: TextCodec, prompt: Prompt) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        text.encode(prompt)
    assert caught.value.status == 400
    return caught.value


def test_text_prompt() -> None:
    text = codec()
    assert text.tokenizer.decode(text.encode(TextPrompt("hé"))) == "<s>hé"
    assert text.tokenizer.decode(text.encode(TextPrompt("hé", add_special_tokens=False))) == "hé"
    assert refusal(text, TextPrompt("", add_special_tokens=False)).param == "prompt"


def test_token_prompt_is_checked_against_the_vocabulary() -> None:
    text = codec(vocab_size=300)
    assert text.encode(TokensPrompt((0, 299))) == [0, 299]
    for bad in (300, -1, 2**40):
        error = refusal(text, TokensPrompt((1, bad)))
        assert error.param == "prompt"
        assert str(bad) in error.message
    assert refusal(text, TokensPrompt(())).param == "prompt"


def test_a_tokenizer_larger_than_the_model_is_refused_per_request() -> None:
    assert "out of vocabulary" in refusal(codec(vocab_size=256), TextPrompt("hi")).message


@pytest.mark.parametrize("prompt", [TextPrompt("a\ud800"), ChatPrompt([USER | {"content": "\udfff"}])], ids=repr)
def test_lone_surrogates(prompt: Prompt) -> None:
    assert "lone surrogate" in refusal(codec(), prompt).message


def test_text_that_cannot_fit_is_refused_before_tokenising() -> None:
    error = refusal(codec(), TextPrompt("x" * 32_001))
    assert isinstance(error, ContextLengthExceeded)
    assert "1000" in error.message
    assert refusal(codec(), ChatPrompt([USER | {"content": "x" * 40_000}])).param == "messages"


@pytest.mark.parametrize("unit", [" ", "a", "\n", "\u0301", "😀", "<s>"])
def test_long_monotonous_text_is_no_blow_up(unit: str) -> None:
    text = codec(context_length=100_000)
    assert len(text.encode(TextPrompt(unit * 300_000))) >= 300_000


def test_chat() -> None:
    assert rendered([USER]) == "<|user|>hi</s><|assistant|>"
    assert rendered([USER], add_generation_prompt=False) == "<|user|>hi</s>"
    final = [USER, {"role": "assistant", "content": "well"}]
    assert (
        rendered(final, add_generation_prompt=False, continue_final_message=True) == "<|user|>hi</s><|assistant|>well"
    )
    assert "<s>" not in rendered([USER])  # only what the template writes


def test_contradicting_options_are_refused() -> None:
    both = ChatPrompt([USER], add_generation_prompt=True, continue_final_message=True)
    assert "not compatible" in refusal(codec(), both).message


def test_tools_and_template_arguments_reach_the_template() -> None:
    template = "{{ tools[0].function.name }}:{{ mood }}:{{ messages[0].tool_calls[0].function.arguments.x }}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert rendered(messages, template, tools=tools, template_kwargs={"mood": "calm"}) == "f:calm:7"
    call["function"] = {"name": "f", "arguments": "{broken"}
    assert rendered(messages, "{{ messages[0].tool_calls[0].function.arguments }}") == "{broken"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_tensors", "conversation", "messages"])
def test_clients_cannot_replace_the_template(name: str) -> None:
    error = refusal(codec(), ChatPrompt([USER], template_kwargs={name: "{{ 1 }}"}))
    assert error.param == "chat_template_kwargs"


def test_developer_becomes_system_unless_the_template_knows_it() -> None:
    messages = [{"role": "developer", "content": "be nice"}, USER]
    assert rendered(messages).startswith("<|system|>be nice")
    assert rendered(messages, TEMPLATE + "{# developer #}").startswith("<|developer|>be nice")
    strict = "{% for m in messages %}{% if m.role not in ['system', 'user'] %}{{ raise_exception('no') }}{% endif %}"
    assert rendered(messages, strict + "{{ m.content }}{% endfor %}") == "be nicehi"


def test_named_templates() -> None:
    named = {"default": "plain", "tool_use": "tools"}
    assert rendered([USER], named) == "plain"
    assert rendered([USER], named, tools=[{"type": "function", "function": {"name": "f"}}]) == "tools"
    assert "default" in refusal(codec({"rag": "x"}), ChatPrompt([USER])).message


def test_no_template_and_no_messages() -> None:
    assert "no chat template" in refusal(codec(None), ChatPrompt([USER])).message
    assert refusal(codec(), ChatPrompt([])).param == "messages"


HOSTILE = {
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "syntax": ("{% for %}", "refused"),
    "attribute": ("{{ messages.__class__.__mro__ }}", "refused"),
    "undefined": ("{{ nothing.at.all }}", "refused"),
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "ange"),
    "output": ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "characters"),
    "division": ("{{ 1 / 0 }}", "division"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refused"),
    "loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_CPU_S", 0.3 if name == "loop" else 20.0)
    template, expected = HOSTILE[name]
    error = refusal(codec(template), ChatPrompt([USER]))
    assert expected in error.message
    assert error.param == "messages"
    assert "Traceback" not in error.message
    assert rendered([USER]) == "<|user|>hi</s><|assistant|>"  # and nothing is left behind


def test_rendering_works_in_any_thread() -> None:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(rendered([USER])))
    thread.start()
    thread.join()
    assert results == ["<|user|>hi</s><|assistant|>"]


def test_eos_ids_of_both_sources() -> None:
    assert codec().eos_token_ids == (257,)
    assert TextCodec(byte_tokenizer(), (7, 9)).eos_token_ids == (7, 9, 257)


# --- directories -------------------------------------------------------------------------------------------------


@pytest.fixture
def base_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    byte_tokenizer().save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12]}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 13}))
    return directory


@pytest.fixture
def base(base_directory: Path) -> TextCodec:
    return TextCodec.from_directory(base_directory, context_length=500, vocab_size=260)


def adapter(tmp_path: Path, **files: Any) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_a_backbone_directory(base: TextCodec) -> None:
    assert base.eos_token_ids == (11, 12, 257)
    assert base.vocab_size == 260
    assert base.chat_template == TEMPLATE
    assert base.encode(TextPrompt("a"))[0] == 256


def test_loading_needs_no_network(base_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        pytest.fail("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TextCodec.from_directory(base_directory, context_length=500).encode(TextPrompt("a"))


def test_eos_from_config_where_there_is_no_generation_config(base_directory: Path) -> None:
    (base_directory / "generation_config.json").unlink()
    assert TextCodec.from_directory(base_directory, context_length=500).eos_token_ids == (13, 257)


def test_an_adapter_without_tokenizer_files_shares_everything(tmp_path: Path, base: TextCodec) -> None:
    assert TextCodec.from_directory(adapter(tmp_path), base) is base
    assert TextCodec.from_directory(adapter(tmp_path), base, vocab_size=260) is base
    larger = TextCodec.from_directory(adapter(tmp_path), base, vocab_size=262)
    assert (larger.vocab_size, larger.tokenizer) == (262, base.tokenizer)


def test_an_adapter_with_a_template_shares_the_tokenizer(tmp_path: Path, base: TextCodec) -> None:
    for files in ({"chat_template__jinja": "T"}, {"tokenizer_config__json": {"chat_template": "T"}}):
        own = TextCodec.from_directory(adapter(tmp_path, **files), base)
        assert own.tokenizer is base.tokenizer
        assert own.vocabulary is base.vocabulary
        assert own.tokenizer.decode(own.encode(ChatPrompt([USER]))) == "T"
        assert own.eos_token_ids == base.eos_token_ids
    assert base.chat_template == TEMPLATE


def test_an_adapter_with_another_eos(tmp_path: Path, base: TextCodec) -> None:
    own = TextCodec.from_directory(adapter(tmp_path, tokenizer_config__json={"eos_token": {"content": "<s>"}}), base)
    assert own.eos_token_ids == (11, 12, 256)
    with pytest.raises(AdapterInvalid, match="eos_token"):
        TextCodec.from_directory(adapter(tmp_path, tokenizer_config__json={"eos_token": "<nope>"}), base)


def test_a_copy_of_the_tokenizer_is_not_loaded_again(tmp_path: Path, base: TextCodec) -> None:
    directory = adapter(tmp_path)
    byte_tokenizer().save_pretrained(directory)
    own = TextCodec.from_directory(directory, base)
    assert own.tokenizer is base.tokenizer
    assert own.chat_template == TEMPLATE
    assert own.vocab_size == 260


def test_a_copy_with_other_settings_is_loaded(tmp_path: Path, base: TextCodec) -> None:
    directory = adapter(tmp_path)
    byte_tokenizer().save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<s>"}))
    own = TextCodec.from_directory(directory, base)
    assert own.tokenizer is base.tokenizer
    assert own.eos_token_ids == (11, 12, 256)
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": True}))
    assert TextCodec.from_directory(directory, base).tokenizer is not base.tokenizer


def test_an_adapter_with_its_own_vocabulary(tmp_path: Path, base: TextCodec) -> None:
    directory = adapter(tmp_path)
    byte_tokenizer(("<new>",), eos="<new>").save_pretrained(directory)
    own = TextCodec.from_directory(directory, base, vocab_size=259)
    assert own.tokenizer is not base.tokenizer
    assert own.encode(TextPrompt("<new>", add_special_tokens=False)) == [258]
    assert own.eos_token_ids == (11, 12, 258)
    assert own.context_length == 500
    assert own.chat_template == TEMPLATE  # falls back to the backbone's
    assert len(base.encode(TextPrompt("<new>", add_special_tokens=False))) == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "[1"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", "x" * 2_000_000),
    ],
)
def test_broken_files_are_refused_with_the_reason(tmp_path: Path, base: TextCodec, name: str, content: str) -> None:
    directory = adapter(tmp_path)
    (directory / name).write_text(content)
    with pytest.raises(AdapterInvalid) as caught:
        TextCodec.from_directory(directory, base)
    assert str(tmp_path) not in caught.value.message


def test_remote_code_is_never_run(tmp_path: Path, base: TextCodec) -> None:
    directory = adapter(tmp_path)
    byte_tokenizer(("<new>",)).save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(AdapterInvalid):  # refused or loaded as a plain tokenizer: transformers decides
        TextCodec.from_directory(directory, base)
    assert not (tmp_path / "pwned").exists()
