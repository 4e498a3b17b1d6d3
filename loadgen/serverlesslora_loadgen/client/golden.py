"""Golden answers: what each adapter says to a prompt when nobody else is asking.

Under load the same words have to come. An adapter that is mixed up with another one answers fast and well formed, and
nothing else would notice. The file has a line per answer: `model`, `prompt` or `messages`, `max_tokens`, `text`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from serverlesslora_loadgen.client.connection import Client
from serverlesslora_loadgen.errors import TargetError, TraceError, WorkloadError
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.trace import Message

Content = str | tuple[int, ...] | tuple[Message, ...]
SWEEP_S = 0.25


class Golden(msgspec.Struct, frozen=True, omit_defaults=True):
    model: str
    max_tokens: int
    text: str
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None

    @property
    def content(self) -> Content:
        content = self.prompt if self.prompt is not None else self.messages
        assert content is not None
        return content


class _Asked(msgspec.Struct, frozen=True):
    """What a planned body asks for, as far as it decides the answer."""

    model: str
    max_tokens: int
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None


class Goldens:
    """Answers by adapter, prompt and length. Prompts are kept as digests: a run has many, and they are long."""

    def __init__(self, answers: Iterable[Golden] = ()) -> None:
        self._texts = {_key(each.model, each.content, each.max_tokens): each.text for each in answers}

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, model: str, content: Content, max_tokens: int) -> str | None:
        """None: nobody has asked this before, so there is nothing to hold the answer to."""
        return self._texts.get(_key(model, content, max_tokens))


def _key(model: str, content: Content, max_tokens: int) -> tuple[str, int, bytes]:
    return model, max_tokens, hashlib.blake2b(msgspec.json.encode(content), digest_size=16).digest()


def read_goldens(path: Path) -> Goldens:
    """Raises TraceError naming the line that is no golden answer."""
    decoder = msgspec.json.Decoder(Golden)
    answers = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    answers.append(decoder.decode(line))
                    if (answers[-1].prompt is None) == (answers[-1].messages is None):
                        raise TraceError(f"{path}:{number} needs either a prompt or messages")
    except OSError as error:
        raise TraceError(f"cannot read the golden answers {path}: {error}") from error
    except msgspec.DecodeError as error:
        raise TraceError(f"{path}:{number} is no golden answer: {error}") from error
    return Goldens(answers)


def write_goldens(path: Path, answers: Iterable[Golden]) -> None:
    encoder = msgspec.json.Encoder()
    path.write_bytes(b"".join(encoder.encode(answer) + b"\n" for answer in answers))


def choose(planned: Sequence[Planned], *, per_adapter: int | None) -> list[Planned]:
    """The first few different requests of each adapter; None: all different ones."""
    chosen, seen, counts = [], set(), Counter[str]()
    for request in planned:
        if request.body not in seen and (per_adapter is None or counts[request.model] < per_adapter):
            seen.add(request.body)
            counts[request.model] += 1
            chosen.append(request)
    return chosen


async def record_goldens(
    target: Target,
    planned: Sequence[Planned],
    *,
    per_adapter: int | None = None,
    on_answer: Callable[[Record], None] = lambda _: None,
) -> list[Golden]:
    """Asks one by one, in the order of the plan.

    Raises WorkloadError when answers would not be the same twice, TargetError for the first that is not sound: what
    is wrong already when nobody else is asking cannot be a measure for others.
    """
    if target.temperature != 0:
        raise WorkloadError(f"answers at temperature {target.temperature:g} differ; golden ones need temperature 0")
    answers = []
    async with Asking(target) as asking:
        for request in choose(planned, per_adapter=per_adapter):
            record, text = await asking.ask(msgspec.structs.replace(request, golden=None))
            on_answer(record)
            if record.outcome != "ok":
                why = record.failure or record.outcome
                raise TargetError(
                    f"{target.url} gave no golden answer to request {request.id} ({why}): {record.detail}"
                )
            asked = msgspec.json.decode(request.body, type=_Asked)
            answers.append(Golden(asked.model, asked.max_tokens, text, asked.prompt, asked.messages))
    return answers


class Asking:
    """One request after another, with the text of the answers, on the caller's own loop."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def __aenter__(self) -> Asking:
        self._client = Client(self._target, self._ended, keep_text=True)
        self._answers: asyncio.Queue[tuple[Record, str]] = asyncio.Queue()
        self._sweeping = asyncio.create_task(self._sweep())
        await self._client.resolve()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sweeping.cancel()
        self._client.close()
        await asyncio.wait([self._sweeping])
        await asyncio.sleep(0)  # connections close in the next round of the loop

    async def ask(self, planned: Planned) -> tuple[Record, str]:
        self._client.start_at = self._client.now()
        self._client.send(planned, self._client.start_at)
        return await self._answers.get()

    def _ended(self, record: Record, text: str) -> None:
        self._answers.put_nowait((record, text))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._client.sweep()
