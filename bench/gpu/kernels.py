"""Every kernel on the real device, with the shapes of real models, against float64; and what its first use costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import attention_cases, sgmv_cases
from bench.gpu.attention_cases import Heads
from bench.gpu.errors import TOLERANCE, relative, short
from bench.gpu.record import Recorder
from bench.gpu.timing import Stopwatch
from serverlesslora_kernels.cuda import fused, linear
from serverlesslora_kernels.cuda.attention import DevicePlan, paged_attention, varlen_attention, write_kv

Result = TypeVar("Result")


def run(recorder: Recorder) -> None:
    torch.manual_seed(0)
    proof = Proof(recorder)
    dtype = getattr(torch, recorder.setting.variant)
    with torch.inference_mode():
        recorder.part("attention", lambda: proof.attention(dtype))
        recorder.part("sgmv", lambda: proof.sgmv(dtype))
        recorder.part("layer operations", lambda: proof.layer(dtype))
        recorder.part("linear", lambda: proof.linear(dtype))
        if dtype is torch.bfloat16:
            recorder.part("static plan", proof.static_plan)
        else:
            recorder.part("sampling", proof.sampling)
        if dtype is torch.float32:
            recorder.part("checksum", proof.checksum)
    for name, seconds in proof.first_uses.items():
        recorder.number(f"first use, compiling: {name}", seconds, "s")


class Proof:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._device = recorder.setting.torch_device
        self._dry = recorder.setting.is_dry
        self._watch = Stopwatch(recorder.setting)
        self.first_uses: dict[str, float] = {}

    def _first(self, name: str, call: Callable[[], Result]) -> Result:
        """Times the first call of each name; kernels are compiled in it."""
        began = time.perf_counter()
        result = call()
        self._watch.synchronize()
        self.first_uses.setdefault(name, time.perf_counter() - began)
        return result

    def _random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=self._device).to(dtype)

    def sgmv(self, dtype: torch.dtype) -> None:
        """Heterogeneous ranks, absent sites, bare rows, rows of a wider tensor; what is not ours stays as it was."""
        for name, layout in sgmv_cases.layouts(4096 if not self._dry else 64).items():
            ranks = (8, 16, 64, 256, 3) if not self._dry else (2, 4, 3)
            adapters = sgmv_cases.Adapters([layout], ranks, dtype, self._device, real=True)
            for label, row_slots in sgmv_cases.row_slots(len(ranks), small=self._dry).items():
                x = self._random(len(row_slots), layout.in_features, dtype=dtype)
                y = self._random(len(row_slots), adapters.width(0) + 16, dtype=dtype)  # of a wider row
                before = y.clone()
                wanted = adapters.oracle(0, before, x, row_slots) - before.double()
                for variant in ("rows", "tiles"):
                    if variant == "rows" and len(row_slots) > 64:
                        continue
                    y.copy_(before)
                    self._first(f"sgmv {variant} {short(dtype)}", adapters.call(variant, 0, y, x, row_slots))
                    # Only what was added is compared: y itself would hide an update that is missing.
                    error = relative(y.double() - before.double(), wanted)
                    rounding = float(before.double().norm() / wanted.norm().clamp_min(1e-30))
                    self._recorder.within(
                        f"sgmv {variant} {name} {label} {short(dtype)}", error, TOLERANCE[dtype] * max(1.0, rounding)
                    )
                    bare = torch.tensor([slot < 0 for slot in row_slots], device=self._device)
                    untouched = torch.equal(y[bare], before[bare]) and torch.equal(y[:, -16:], before[:, -16:])
                    self._recorder.check(f"sgmv {variant} {name} {label} {short(dtype)}: the rest untouched", untouched)

    def attention(self, dtype: torch.dtype) -> None:
        real, tiny = (Heads(32, 8, 128), Heads(14, 2, 64)), (Heads(4, 2, 16),)
        contexts = [1, 17, 300, 1025, 4096] if not self._dry else [1, 17, 40]
        # Every option is another program to compile; the types that are served less get fewer of them.
        for heads in tiny if self._dry else real[: 2 if dtype is torch.bfloat16 else 1]:
            batches = {
                "decode": ([1] * len(contexts), contexts),
                "mixed": ([1, 1, 200, 129], [33, 900, 200, 700]) if not self._dry else ([1, 5, 3], [20, 5, 30]),
            }
            for name, (q_lens, lengths) in batches.items():
                case = attention_cases.build(heads, q_lens, lengths, 16, dtype, self._device)
                sinks = self._random(heads.q, dtype=dtype)
                window = 8 if self._dry else 100
                everything: dict[str, Any] = {"sliding_window": window, "softcap": 20.0, "sinks": sinks}
                for label, options in (("plain", {}), ("window, cap and sinks", everything)):
                    scale = heads.dim**-0.5
                    out = self._first(
                        f"attention {name} {short(dtype)}",
                        lambda: paged_attention(case.q, case.kv, case.plan, scale=scale, **options),  # noqa: B023
                    )
                    wanted = attention_cases.oracle(case, scale=scale, **options)
                    self._recorder.within(
                        f"attention {name} {heads.q}/{heads.kv}/{heads.dim} {label} {short(dtype)}",
                        relative(out, wanted),
                        TOLERANCE[dtype],
                    )
        if not self._dry and dtype is torch.bfloat16:
            self._varlen(dtype)

    def _varlen(self, dtype: torch.dtype) -> None:
        case = attention_cases.build(Heads(32, 8, 128), [1] * 4, [300, 900, 20, 2000], 256, dtype, self._device)
        out = varlen_attention(case.q, case.kv, case.plan, scale=0.09)
        if out is None:
            self._recorder.check("torch's varlen attention", True, "skipped: this torch has none for block tables")
        else:
            error = relative(out, attention_cases.oracle(case, scale=0.09))
            self._recorder.within("torch's varlen attention", error, TOLERANCE[dtype])

    def static_plan(self) -> None:
        """What a graph replays: rows that are not used are written nowhere and give zeros."""
        dtype, heads = torch.bfloat16, Heads(32, 8, 128) if not self._dry else Heads(4, 2, 16)
        contexts = [700, 33, 1] if not self._dry else [20, 3]
        case = attention_cases.build(heads, [1] * len(contexts), contexts, 16, dtype, self._device)
        plan = DevicePlan.static(8, 64, 16, self._device)
        tables = [case.plan.block_table[row].tolist() for row in range(len(contexts))]
        for used in (len(contexts), 1):
            plan.fill(contexts[:used], tables[:used])
            q = torch.cat((case.q, self._random(8 - len(contexts), heads.q, heads.dim, dtype=dtype)))
            out = paged_attention(q, case.kv, plan, scale=0.1)
            wanted = attention_cases.oracle(case, scale=0.1)[:used]
            self._recorder.within(f"static plan, {used} rows", relative(out[:used], wanted), TOLERANCE[dtype])
            self._recorder.check(f"static plan, {8 - used} idle rows are zeros", not bool(out[used:].any()))
        before = case.kv.k.clone()
        plan.fill([], [])
        new = self._random(8, heads.kv, heads.dim, dtype=dtype)
        write_kv(case.kv, new, new, plan)
        same = torch.equal(case.kv.k.nan_to_num(), before.nan_to_num())
        self._recorder.check("static plan: idle rows write nothing", same)

    def layer(self, dtype: torch.dtype) -> None:
        hidden, inner, rows = (4096, 14336, 33) if not self._dry else (64, 96, 3)
        tolerance, name = TOLERANCE[dtype], short(dtype)
        x, weight = self._random(rows, hidden, dtype=dtype), self._random(hidden, dtype=dtype)

        def norm(values: Tensor, offset: bool) -> Tensor:
            wide = values.double()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return wide * (weight.double() + offset)

        for offset in (False, True):
            out = self._first(f"rms_norm {name}", lambda: fused.rms_norm(x, weight, 1e-5, offset=offset))  # noqa: B023
            self._recorder.within(f"rms_norm offset={offset} {name}", relative(out, norm(x, offset)), tolerance)
        residual = self._random(rows, hidden, dtype=dtype)
        summed = (residual.double() + x.double()).to(dtype)
        out = fused.add_rms_norm(x, residual, weight, 1e-5)
        self._recorder.within(f"add_rms_norm sum {name}", relative(residual, summed), tolerance / 10)
        self._recorder.within(f"add_rms_norm {name}", relative(out, norm(summed, False)), tolerance)
        gate_up = self._random(rows, 2 * inner, dtype=dtype)
        gate, up = gate_up.double().chunk(2, -1)
        out = self._first(f"silu_mul {name}", lambda: fused.silu_mul(gate_up))
        self._recorder.within(f"silu_mul {name}", relative(out, F.silu(gate) * up), tolerance)
        out = fused.gelu_tanh_mul(gate_up)
        self._recorder.within(f"gelu_tanh_mul {name}", relative(out, F.gelu(gate, approximate="tanh") * up), tolerance)
        self._rope(dtype)

    def _rope(self, dtype: torch.dtype) -> None:
        heads = Heads(32, 8, 128) if not self._dry else Heads(4, 2, 16)
        contexts = [40, 7] if not self._dry else [9, 2]
        case = attention_cases.build(heads, [1, 1], contexts, 16, dtype, self._device)
        k, v = (self._random(2, heads.kv, heads.dim, dtype=dtype) for _ in range(2))
        angle = torch.randn(2, heads.dim // 2, device=self._device).repeat(1, 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

        def turned(x: Tensor) -> Tensor:
            low, high = x.double().chunk(2, -1)
            return x.double() * cos.double()[:, None] + torch.cat((-high, low), -1) * sin.double()[:, None]

        name, tolerance = short(dtype), TOLERANCE[dtype]
        q_out, k_out = self._first(f"rope {name}", lambda: fused.rope(case.q, k, cos, sin))
        self._recorder.within(f"rope q {name}", relative(q_out, turned(case.q)), tolerance)
        self._recorder.within(f"rope k {name}", relative(k_out, turned(k)), tolerance)
        stored = fused.rope_and_store(case.q, k, v, cos, sin, case.kv, case.plan)
        slots = case.plan.slots.long()
        found_k = case.kv.k[slots // 16, slots % 16]
        found_v = case.kv.v[slots // 16, slots % 16]
        self._recorder.within(f"rope_and_store {name}: the same rotations", relative(stored, turned(case.q)), tolerance)
        self._recorder.within(f"rope_and_store {name}: keys in the cache", relative(found_k, turned(k)), tolerance)
        self._recorder.check(f"rope_and_store {name}: values in the cache", torch.equal(found_v, v))

    def linear(self, dtype: torch.dtype) -> None:
        n, k = (6144, 4096) if not self._dry else (48, 64)
        weight = self._random(n, k, dtype=dtype) / k**0.5
        for label, products in (
            ("library", linear.Linear()),
            ("skinny", linear.Linear(linear.LinearChoice(otherwise="skinny"))),
        ):
            for rows in (1, 2, 8, 16, 32) if not self._dry else (1, 3):
                x, y = self._random(rows, k, dtype=dtype), self._random(rows, n, dtype=dtype)
                wanted = x.double() @ weight.double().T
                out = self._first(f"linear {label} {short(dtype)}", lambda: products.linear(x, weight))  # noqa: B023
                name = f"linear {label} {rows} rows {short(dtype)}"
                self._recorder.within(name, relative(out, wanted), TOLERANCE[dtype])
                wanted = wanted + y.double()
                products.add_linear(y, x, weight)
                self._recorder.within(f"add_{name}", relative(y, wanted), TOLERANCE[dtype])

    def sampling(self) -> None:
        """Against the host's sampler: the same tokens for the same draws."""
        from serverlesslora.engine.cuda.sampler import sample_rows
        from serverlesslora.engine.sampler import Sampler, SampleRow
        from serverlesslora_ipc.messages import SamplingParams

        vocab, rows = (128256, 32) if not self._dry else (300, 6)
        logits = torch.randn(rows, vocab, device=self._device) * 3
        logits[0] = float("nan")
        cases = {
            "greedy": SamplingParams(temperature=0.0),
            "plain": SamplingParams(temperature=0.8),
            "top_k": SamplingParams(temperature=1.2, top_k=50),
            "top_p": SamplingParams(top_p=0.9),
            "min_p": SamplingParams(min_p=0.02),
        }
        for name, params in cases.items():
            asked = [SampleRow(params, seed=row, position=7) for row in range(rows)]
            drawn = self._first(f"sampling {name}", lambda: sample_rows(logits, asked)).tolist()  # noqa: B023
            wanted = [sampled.token_id for sampled in Sampler().sample(logits.cpu(), asked)]
            self._recorder.check(f"sampling {name}: a row without finite logits is said so", drawn[0] == -1)
            different = sum(a != b for a, b in zip(drawn, wanted, strict=True))
            # A draw at the very edge between two tokens may fall to either side: sums are made in another order.
            allowed = 0 if name == "greedy" else 2
            self._recorder.check(
                f"sampling {name}: the host's tokens", different <= allowed, f"{different} of {rows} differ"
            )

    def checksum(self) -> None:
        from serverlesslora_kernels.cuda import checksum

        size = (256 << 20) + 5 if not self._dry else (1 << 16) + 5
        region = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self._device)
        whole = self._first("checksum", lambda: checksum.digest(region))
        stepped = checksum.Checksum(region, slice_bytes=size // 5)
        while (answer := stepped.step()) is None:
            pass
        self._recorder.check("slices give the digest of the whole", answer == whole)
        for place in (0, size // 3, size - 1):
            region[place] ^= 16
            self._recorder.check(f"one changed bit at {place} is seen", checksum.digest(region) != whole)
            region[place] ^= 16
        self._recorder.check("and back again", checksum.digest(region) == whole)
        rate = region.nbytes / self._watch.wall_us(lambda: checksum.digest(region)) / 1e3
        self._recorder.number("checksum of a region", rate, "GB/s")
