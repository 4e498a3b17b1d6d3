"""adapter_config.json as validated values: what changes the arithmetic is understood or refused with the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serverlesslora.engine.lora.patterns import PatternTable, check_number
from serverlesslora.errors import AdapterInvalid

MAX_CONFIG_BYTES = 4 << 20
MAX_RANK = 1024
MAX_ALPHA = 1e30
MAX_TARGET_MODULES = 100_000  # a plain list may name every module
MAX_TARGETS = 256  # in modules_to_save and target_parameters

# Options that change what a forward pass computes in a way this server does not implement.
UNSUPPORTED = {
    "layer_replication": "it changes the layers of the model, and the backbone is shared",
    "megatron_config": "Megatron layers are not served; export to plain PEFT first",
    "use_qalora": "QALoRA needs a quantised backbone",
    "alora_invocation_tokens": "activated LoRA (a part of the prompt without the adapter) is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "arrow_config": "Arrow routing between adapters is not served",
    "kasa_config": "KaSA changes the weights of the backbone, which is shared",
    "monteclora_config": "MonteCLoRA is not served; merge its samples into plain LoRA first",
    "velora_config": "VeLoRA is not served; save the trained weights as plain LoRA",
}
# Initialisations that subtract what they take from the base weights: such adapters fit a changed base model only.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")

# Fields that only matter for training, for bookkeeping, or together with one of the fields above.
IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
UNDERSTOOD = frozenset({
    "alpha_pattern", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save",
    "peft_type", "r", "rank_pattern", "target_modules", "target_parameters", "trainable_token_indices", "use_dora",
    "use_rslora",
})  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    rank: int
    alpha: float
    ranks: PatternTable[int]
    alphas: PatternTable[float]
    rslora: bool
    dora: bool
    bias: str
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    required_modules: tuple[str, ...]  # targets by plain name: every module of that name must be in the file
    target_parameters: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]  # embedding name ("" is the input embedding) -> retrained token ids
    tie: bool

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        alpha = self.alphas.get(module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_settings(path: Path) -> LoraSettings:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise AdapterInvalid(f"{path.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
        config = json.loads(text)
    except OSError as error:
        raise AdapterInvalid(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{path.name} is not valid JSON") from error
    if not isinstance(config, dict):
        raise AdapterInvalid(f"{path.name} must hold a JSON object")
    return parse_settings(config)


def parse_settings(config: Mapping[str, Any]) -> LoraSettings:
    _refuse_unsupported(config)
    targets = config.get("target_modules")
    picked = config.get("layers_to_transform") is None and not config.get("exclude_modules")
    return LoraSettings(
        rank=_rank("r", config.get("r", 8)),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        ranks=PatternTable("rank_pattern", _pattern(config, "rank_pattern", _rank)),
        alphas=PatternTable("alpha_pattern", _pattern(config, "alpha_pattern", _alpha)),
        rslora=_flag(config, "use_rslora"),
        dora=_flag(config, "use_dora"),
        bias=_choice(config, "bias", ("none", "all", "lora_only")),
        lora_bias=_flag(config, "lora_bias"),
        modules_to_save=_names(config, "modules_to_save"),
        required_modules=_names(config, "target_modules") if picked and isinstance(targets, list) else (),
        target_parameters=_names(config, "target_parameters"),
        tokens=_tokens(config.get("trainable_token_indices")),
        tie=_flag(config, "ensure_weight_tying"),
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterInvalid(f"peft_type is {_short(kind)}; only LORA adapters are served")
    for field, reason in UNSUPPORTED.items():
        if config.get(field):
            raise AdapterInvalid(f"{field} is set: {reason}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise AdapterInvalid(
            f"init_lora_weights is {_short(init)}: this adapter fits a base model whose weights were changed when"
            " training started. Save it with path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        )
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in HARMLESS_INITS)):
        raise AdapterInvalid(f"init_lora_weights is {_short(init)}, which this version does not know")
    for field, value in config.items():
        if value and field not in IGNORED and field not in UNDERSTOOD and field not in UNSUPPORTED:
            raise AdapterInvalid(f"adapter_config.json sets {field[:60]!r}, which this version does not know")


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterInvalid(f"{field} is {_short(value)}; a rank is a whole number from 1 to {MAX_RANK}")
    return value


def _alpha(field: str, value: Any) -> float:
    """Negative ones are served: they take away what the adapter adds, and PEFT computes the same."""
    if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
        raise AdapterInvalid(f"{field} is {_short(value)}; it must be a number from -{MAX_ALPHA:g} to {MAX_ALPHA:g}")
    return float(value)


def _pattern(config: Mapping[str, Any], field: str, check: Any) -> dict[str, Any]:
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{field} must be an object of module names")
    check_number(field, value)  # before anything is done for each of a million
    return {key: check(f"{field}[{key[:80]!r}]", item) for key, item in value.items()}


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise AdapterInvalid(f"{field} is {_short(value)}; it must be true or false")
    return bool(value)


def _choice(config: Mapping[str, Any], field: str, choices: tuple[str, ...]) -> str:
    value = config.get(field) or choices[0]
    if value not in choices:
        raise AdapterInvalid(f"{field} is {_short(value)}; it must be one of {', '.join(choices)}")
    return str(value)


def _names(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    value = config.get(field) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise AdapterInvalid(f"{field} must be a list of names")
    limit = MAX_TARGETS if field != "target_modules" else MAX_TARGET_MODULES
    if len(value) > limit:
        raise AdapterInvalid(f"{field} has {len(value)} names; at most {limit} are accepted")
    return tuple(value)


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    named = {"": value} if isinstance(value, list) else value or {}
    if not isinstance(named, dict):
        raise AdapterInvalid("trainable_token_indices must be a list of token ids or an object of such lists")
    for indices in named.values():
        valid = isinstance(indices, list) and all(type(index) is int and 0 <= index < 1 << 31 for index in indices)
        if not valid or len(set(indices)) != len(indices):
            raise AdapterInvalid("trainable_token_indices must hold different token ids, each a whole number")
    return {name: tuple(indices) for name, indices in named.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
