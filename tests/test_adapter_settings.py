"""adapter_config.json of somebody who means harm: refused with the value and the limit, or served in bounded time."""

from __future__ import annotations

from typing import Any

import pytest

from serverlesslora.engine.lora.settings import parse_settings
from serverlesslora.errors import AdapterInvalid

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"r": 2**31}, "r is 2147483648; .* 1 to 1024"),
        ({"r": 4.0}, "r is 4.0; .* 1 to 1024"),
        ({"lora_alpha": 1e31}, r"lora_alpha is 1e\+31; .* -1e\+30 to 1e\+30"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"(a+)+$": 4}}, r"'\(a\+\)\+\$' uses nested repeats"),
    ],
)
def test_refused_with_the_value_and_the_limit(given: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterInvalid, match=match):
        parse_settings(CONFIG | given)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_million_patterns_are_counted_and_not_looked_at(field: str) -> None:
    worthless = dict.fromkeys(map(str, range(1_000_000)), "no number")
    with pytest.raises(AdapterInvalid, match=f"{field} has 1000000 keys; at most 4096"):
        parse_settings(CONFIG | {field: worthless})


def test_target_modules_as_an_expression_is_never_run() -> None:
    assert parse_settings(CONFIG | {"target_modules": "(a+)+$"}).required_modules == ()


def test_a_negative_alpha_takes_away_what_the_adapter_adds() -> None:
    assert parse_settings(CONFIG | {"lora_alpha": -8}).scale_of("q_proj", 4) == -2.0
