"""`serverlesslora doctor ADAPTER`: a dry run. What is in it, would it be served, and do its outputs equal PEFT's?

`serverlesslora doctor --device` asks the machine instead: see `device_report`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from serverlesslora.adapters.files import CONFIG
from serverlesslora.adapters.store import AdapterStore
from serverlesslora.cli import device_report
from serverlesslora.cli.serve import Subparsers
from serverlesslora.demo import backbone_path
from serverlesslora.errors import AdapterInvalid, ConfigError, ServerlessLoraError

TOLERANCE = 1e-4
PROBE_TOKENS = 24


class Diagnosis(msgspec.Struct, frozen=True):
    adapter: str
    digest: str
    size_bytes: int
    backbone: str | None  # None: nothing to check it against
    served: bool | None = None
    refused_because: str | None = None
    rank: int | None = None
    modules: int | None = None
    kinds: tuple[str, ...] = ()
    load_s: float | None = None
    max_logit_difference: float | None = None  # against PEFT, float32
    differs_from_base: bool | None = None


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check an adapter, or this machine's GPU, without a server",
        description="Loads the adapter strictly on its backbone, in float32, and compares its logits with PEFT's.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?", help="directory or other source of the PEFT adapter")
    parser.add_argument(
        "--device",
        nargs="?",
        const="cuda",
        choices=("cuda", "emulated"),
        help="print what this machine's GPU offers and whether backbones can be shared on it",
    )
    parser.add_argument(
        "--backbone",
        metavar="MODEL",
        help="directory or hub id of its base model, or 'demo' [what the adapter's own config names]",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.device is not None:
        found = device_report.examine(arguments.device)
        if arguments.json:
            print(msgspec.json.encode(found).decode())
        else:
            device_report.report(found)
        return 0 if found.usable else 1
    if arguments.adapter is None:
        raise ConfigError("name an adapter's directory, or --device")
    diagnosis = diagnose(arguments.adapter, arguments.backbone)
    if arguments.json:
        print(msgspec.json.encode(diagnosis).decode())
    else:
        report(diagnosis)
    parity_holds = diagnosis.max_logit_difference is None or diagnosis.max_logit_difference <= TOLERANCE
    return 0 if diagnosis.served is not False and parity_holds else 1


def diagnose(adapter: str, backbone: str | None) -> Diagnosis:
    """Raises what the store refuses (not an adapter at all); what the engine refuses is in the result."""
    with tempfile.TemporaryDirectory() as scratch:
        stored = AdapterStore(Path(scratch), max_bytes=1 << 40).add(adapter)
        found = Diagnosis(
            adapter=adapter,
            digest=stored.digest,
            size_bytes=stored.size_bytes,
            backbone=_find_backbone(stored.path, backbone),
        )
        if found.backbone is None:
            return found
        return _try_on(found, stored.path, found.backbone)


def _find_backbone(path: Path, named: str | None) -> str | None:
    if named is not None:
        return str(backbone_path()) if named == "demo" else named
    own = msgspec.json.decode((path / CONFIG).read_bytes()).get("base_model_name_or_path")
    return own if isinstance(own, str) and Path(own).is_dir() else None


def _try_on(found: Diagnosis, path: Path, backbone: str) -> Diagnosis:
    import time
    import warnings

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from serverlesslora.engine.lora import LoraModel, Segment

    warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers' affairs
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the backbone {backbone!r}: {error}") from error
    probe = torch.arange(PROBE_TOKENS)[None] * 37 % (model.config.get_text_config().vocab_size - 1) + 1
    with torch.inference_mode():
        base = model(probe, use_cache=False).logits
        wrapped: Any = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32, use_safetensors=True).eval()
        ours = LoraModel(wrapped)
        began = time.perf_counter()
        try:
            adapter = ours.load(path, found.digest)
        except AdapterInvalid as error:
            return msgspec.structs.replace(found, served=False, refused_because=error.message)
        seconds = time.perf_counter() - began
        ours.set_segments([Segment(0, PROBE_TOKENS, adapter)])
        logits = wrapped(probe, use_cache=False).logits
        try:
            # PEFT executes nothing from a safetensors adapter; the store has refused anything else.
            expected = PeftModel.from_pretrained(model, str(path)).eval()(probe, use_cache=False).logits
        except Exception as error:
            raise ServerlessLoraError(f"we can load this adapter but PEFT cannot: {error}") from error
    width = min(logits.shape[-1], expected.shape[-1])
    return msgspec.structs.replace(
        found,
        served=True,
        rank=adapter.rank,
        modules=adapter.modules,
        kinds=adapter.kinds,
        load_s=seconds,
        max_logit_difference=(logits[..., :width] - expected[..., :width]).abs().max().item(),
        differs_from_base=not torch.equal(expected[..., : base.shape[-1]], base),
    )


def report(found: Diagnosis) -> None:
    console = Console(soft_wrap=True)
    console.print(
        f"adapter    {found.adapter}\ndigest     {found.digest}\nsize       {found.size_bytes / 1e6:.1f} MB",
        highlight=False,
    )
    if found.backbone is None:
        console.print("no backbone to check it against: name one with --backbone", style="yellow")
        return
    console.print(f"backbone   {found.backbone}", highlight=False)
    if not found.served:
        console.print(f"refused    {found.refused_because}", style="red", highlight=False)
        return
    also = f", {', '.join(found.kinds)}" if found.kinds else ""
    console.print(
        f"holds      rank {found.rank}, {found.modules} modules{also}; loads in {1000 * (found.load_s or 0):.0f} ms"
    )
    agrees = found.max_logit_difference is not None and found.max_logit_difference <= TOLERANCE
    console.print(
        f"parity     largest logit difference to PEFT (float32): {found.max_logit_difference:.1e}",
        style="green" if agrees else "red",
    )
    if not found.differs_from_base:
        console.print("the adapter does not change the base's output on the probe: was it trained?", style="yellow")
