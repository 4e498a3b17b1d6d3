"""Decode attention: how much of the device's bandwidth the walk over the keys and values reaches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import attention_cases
from bench.gpu.attention_cases import Case, Heads
from bench.gpu.errors import TOLERANCE, relative
from bench.gpu.record import Recorder
from bench.gpu.timing import Stopwatch, copies_for
from serverlesslora_kernels.cuda.attention import paged_attention, varlen_attention

HEADS = Heads(32, 8, 128)
PREFILL = 2048


def run(recorder: Recorder) -> None:
    torch.manual_seed(0)
    setting = recorder.setting
    heads = Heads(4, 2, 16) if setting.is_dry else HEADS
    with torch.inference_mode():
        for rows in (1, 8, 32) if not setting.is_dry else (2,):
            for context in (512, 4096, 16384) if not setting.is_dry else (24,):
                name = f"decode rows {rows} context {context}"
                recorder.part(name, lambda r=rows, c=context, n=name: _decode(recorder, heads, r, c, n))  # type: ignore[misc]
        recorder.part("prefill", lambda: _prefill(recorder, heads))


def _decode(recorder: Recorder, heads: Heads, rows: int, context: int, name: str) -> None:
    setting, watch = recorder.setting, Stopwatch(recorder.setting)
    num_bytes = rows * context * 2 * heads.kv * heads.dim * 2
    copies = copies_for(num_bytes, setting, most=96)  # the smallest are three times the L2 all together

    def cases(block_size: int, copies: int = copies) -> list[Case]:
        return [
            attention_cases.build(heads, [1] * rows, [context] * rows, block_size, torch.bfloat16, setting.torch_device)
            for _ in range(copies)
        ]

    scale = heads.dim**-0.5
    paged = cases(16)
    ours = watch.graph_us([_bound(lambda c: paged_attention(c.q, c.kv, c.plan, scale=scale), case) for case in paged])
    floor = setting.bytes_us(num_bytes)
    recorder.number(f"{name}: paged, split", ours, "us", floor=floor)
    recorder.number(f"{name}: KV bandwidth", num_bytes / ours / 1e3, "GB/s")

    def contiguous(case: Case) -> Tensor:
        q = case.q[:, :, None, :]  # every row is a sequence of one query
        return F.scaled_dot_product_attention(q, dense[id(case)][0], dense[id(case)][1], scale=scale, enable_gqa=True)

    dense = {
        id(case): tuple(torch.stack(each).transpose(1, 2).contiguous() for each in (case.keys, case.values))
        for case in paged
    }
    out, wanted = paged_attention(paged[0].q, paged[0].kv, paged[0].plan, scale=scale), contiguous(paged[0])
    recorder.within(f"{name}: as torch has it", relative(out, wanted[:, :, 0]), TOLERANCE[torch.bfloat16])
    theirs = watch.graph_us([_bound(contiguous, case) for case in paged])
    recorder.number(f"{name}: torch SDPA over contiguous keys", theirs, "us")
    dense.clear()
    del paged
    if not setting.is_dry:
        _varlen(recorder, name, lambda few: cases(256, few or copies), scale, watch)


def _varlen(recorder: Recorder, name: str, cases: Callable[[int], list[Case]], scale: float, watch: Stopwatch) -> None:
    """For comparison only: what it cannot do is no failure of ours."""

    def call(case: Case) -> Tensor | None:
        return varlen_attention(case.q, case.kv, case.plan, scale=scale)

    try:
        [case] = cases(1)
        if call(case) is None:
            return
        recorder.number(
            f"{name}: torch varlen, pages of 256", watch.graph_us([_bound(call, case) for case in cases(0)]), "us"
        )
    except RuntimeError as error:
        recorder.check(f"{name}: torch varlen", True, f"not usable: {str(error)[:200]}")


def _prefill(recorder: Recorder, heads: Heads) -> None:
    setting, watch = recorder.setting, Stopwatch(recorder.setting)
    tokens = 40 if setting.is_dry else PREFILL
    case = attention_cases.build(heads, [tokens], [tokens], 16, torch.bfloat16, setting.torch_device)
    scale = heads.dim**-0.5
    ours = watch.graph_us([lambda: paged_attention(case.q, case.kv, case.plan, scale=scale)], at_least=4)
    flops = 2 * 2 * tokens * tokens / 2 * heads.q * heads.dim
    recorder.number(f"prefill of {tokens}: paged", ours, "us", floor=setting.flops_us(flops))
    q, k, v = (each.transpose(0, 1)[None] for each in (case.q, case.keys[0], case.values[0]))
    theirs = watch.graph_us(
        [lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)], at_least=4
    )
    recorder.number(f"prefill of {tokens}: torch SDPA", theirs, "us")


def _bound(call: Callable[[Case], object], case: Case) -> Callable[[], object]:
    return lambda: call(case)
