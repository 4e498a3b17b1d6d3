"""One schema for files and flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serverlesslora.cli.flags import NOT_FLAGS
from serverlesslora.cli.main import make_parser
from serverlesslora.cli.serve import config_from
from serverlesslora.config import ServerConfig, build_config
from serverlesslora.demo import ADAPTER_NAMES
from serverlesslora.errors import ConfigError


def parse(*arguments: str) -> ServerConfig:
    return config_from(make_parser().parse_args(["serve", *arguments]))


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 9\nmax_running = 3\n[[backbones]]\nmodel = "/m/base"\n')
    config = parse("--config", str(file), "--port", "7", "--idle-timeout", "2.5", "--no-prefix-cache")
    assert (config.port, config.max_running, config.idle_timeout_s, config.prefix_cache) == (7, 3, 2.5, False)
    assert config.max_queue == ServerConfig().max_queue
    assert config.backbones[0].public_name == "base"


def test_every_setting_has_a_flag_with_its_description() -> None:
    text = " ".join(next(a for a in _serve_parser()._actions if a.dest == f).help or "" for f in _flag_fields())
    assert "loopback" in text
    for field in _flag_fields():
        assert any(action.dest == field and action.help for action in _serve_parser()._actions), field


def _flag_fields() -> list[str]:
    return [field.name for field in msgspec.structs.fields(ServerConfig) if field.name not in NOT_FLAGS]


def _serve_parser() -> argparse.ArgumentParser:
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parser: argparse.ArgumentParser = commands.choices["serve"]
    return parser


def test_adapters_and_models_on_the_command_line() -> None:
    config = parse("qwen=/m/q", "--adapter", "acme/legal=/a/1", "--adapter", "solo=/a/2")
    assert config.backbones[0].public_name == "qwen"
    assert [(f.tenant, f.name, f.adapter) for f in config.functions] == [
        ("acme", "legal", "/a/1"),
        (None, "solo", "/a/2"),
    ]


def test_nothing_named_is_the_demo_in_float32() -> None:
    config = parse()
    assert [f.name for f in config.functions] == list(ADAPTER_NAMES)
    assert (config.backbones[0].public_name, config.dtype) == ("demo", "float32")


def test_a_device_is_named_or_chosen() -> None:
    assert parse().device == "auto"
    assert parse("--device", "emulated", "--kv-memory-mb", "7").device == "emulated"
    assert (parse().kv_memory_mb, parse("--kv-memory-mb", "7").kv_memory_mb) == (None, 7)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ({"prot": 1}, "prot"),
        ({"port": "x"}, "port"),
        ({"port": 70000}, "port"),
        ({"device": "gpu"}, "device"),
        ({"idle_timeout_s": 0}, "idle_timeout_s"),
        ({"functions": [{"name": "../x", "adapter": "a"}]}, "name"),
        ({"backbones": [{"model": "m"}], "functions": [{"name": "m", "adapter": "a"}]}, "more than once"),
        ({"backbones": [{"model": "m"}], "functions": [{"name": "f", "adapter": "a", "backbone": "n"}]}, "'n'"),
    ],
)
def test_mistakes_are_named(layer: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_config(layer)


@pytest.mark.parametrize("text", ["port = ", "= 3"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"server\.toml"):
        parse("--config", str(file))
    with pytest.raises(ConfigError, match="cannot read"):
        parse("--config", str(tmp_path / "absent.toml"))


def test_run_time_deploys_need_a_loopback_address_or_roots() -> None:
    assert build_config({}).runtime_deploys_allowed
    assert not build_config({"host": "0.0.0.0"}).runtime_deploys_allowed
    assert build_config({"host": "0.0.0.0", "adapter_roots": ["/a"]}).runtime_deploys_allowed
