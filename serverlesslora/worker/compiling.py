"""Grammars are compiled beside the running steps, one at a time and not for ever.

llguidance lets other threads run while it compiles, and cannot be interrupted. What takes too long is refused and its
thread left to end by itself; while several such threads are still busy no further grammar is taken.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from serverlesslora.engine.constraint import CompiledGrammar
from serverlesslora.engine.grammar_sources import refusal
from serverlesslora.errors import ServerlessLoraError, Unavailable
from serverlesslora_ipc.messages import Generate

COMPILE_S = 5.0
MAX_LEFT_BEHIND = 2  # threads that compile what nobody waits for any more

Compile = Callable[[], CompiledGrammar]


class GrammarRead(NamedTuple):
    message: Generate
    grammar: CompiledGrammar | ServerlessLoraError


class Compiling:
    def __init__(self, tell: Callable[[GrammarRead], None], *, limit_s: float = COMPILE_S) -> None:
        """`tell` is called in the thread that is in `loop`."""
        self._tell = tell
        self._limit_s = limit_s
        self._tasks: queue.SimpleQueue[tuple[Generate, Compile]] = queue.SimpleQueue()
        self._left_behind: list[threading.Thread] = []

    def put(self, message: Generate, compile: Compile) -> None:
        self._tasks.put((message, compile))

    def loop(self) -> None:
        """Ends with the process."""
        while True:
            self.work()

    def work(self) -> None:
        message, compile = self._tasks.get()
        self._tell(GrammarRead(message, self._attempt(message, compile)))

    def _attempt(self, message: Generate, compile: Compile) -> CompiledGrammar | ServerlessLoraError:
        grammar = message.sampling.grammar
        assert grammar is not None
        self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
        if len(self._left_behind) >= MAX_LEFT_BEHIND:
            return Unavailable("grammars that take too long are still being compiled; try again", retry_after_s=10)
        results: list[CompiledGrammar | ServerlessLoraError] = []

        def attempt() -> None:
            try:
                results.append(compile())
            except ServerlessLoraError as error:
                results.append(error)
            except BaseException as error:  # a compiler that panics on a grammar: that request ends, no other
                results.append(refusal(grammar, str(error)))

        thread = threading.Thread(target=attempt, name="grammar", daemon=True)
        thread.start()
        thread.join(self._limit_s)
        if results:
            return results[0]
        self._left_behind.append(thread)
        return refusal(grammar, f"compiling it took longer than {self._limit_s:g} s")
