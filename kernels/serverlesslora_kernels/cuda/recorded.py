"""What a wrapper would have Triton compile, seen by calling it on tensors without data.

A list of signatures kept by hand would drift away from the launches; this one cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


class CompileCase(NamedTuple):
    program: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cases: list[CompileCase] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    def launch(self, program: Any, grid: Sequence[int], arguments: Sequence[Any], options: dict[str, Any]) -> None:
        constexprs = {name: value for name, value in options.items() if name in program.arg_names}
        types = dict(zip(program.arg_names, map(_type_of, arguments), strict=False)) | dict.fromkeys(
            constexprs, "constexpr"
        )
        assert len(types) == len(arguments) + len(constexprs), f"{program} is given an argument twice"
        signature = {name: types[name] for name in program.arg_names}
        warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
        self.cases.append(CompileCase(program, signature, constexprs, warps, stages))


def record(call: Callable[[], object]) -> list[CompileCase]:
    """The launches of `call`, none of them carried out."""
    recorder = _Recorder()
    with recorder:
        call()
    return recorder.cases


def unique(cases: Sequence[CompileCase]) -> list[CompileCase]:
    return list({repr((case.program.__name__, *case[1:])): case for case in cases}.values())


def _type_of(argument: object) -> str:
    match argument:
        case Tensor():
            return "*" + _TYPES[argument.dtype]
        case bool():
            return "i1"
        case int():
            return "i32" if -(2**31) <= argument < 2**31 else "i64"
        case float():
            return "fp32"
        case _:
            raise TypeError(f"{argument!r} cannot be an argument of a program")
