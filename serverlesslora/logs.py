"""What is logged by every process of the server, and how: one line per event, with who says it and about which request.

Nothing a client sends is logged but names that the server knows: neither prompts nor outputs nor keys, at any level.
So only our own loggers speak below warnings (a library's debug lines may hold anything), and the text of an exception
that nobody expected is left out, because it often quotes what could not be processed; its type and frames are there.
The same holds for whatever fails in a worker, where everything is about what clients said.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from serverlesslora.log_outlet import Outlet

if TYPE_CHECKING:
    import asyncio

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

OURS = "serverlesslora"
ROLE_PREFIX = "slora-"  # of the names our processes give themselves: see `serverlesslora_ipc.process`
FORMAT_VARIABLE, LEVEL_VARIABLE = "SERVERLESSLORA_LOG_FORMAT", "SERVERLESSLORA_LOG_LEVEL"  # as our children get them

SPEAKS_OF_CODE = (AttributeError, ImportError, MemoryError, NameError)  # whose texts quote no values
SPEAKS_OF_DEVICES = ("CUDA", "Triton")  # how texts of RuntimeErrors begin that quote none either

REPEATS, WINDOW_S = 10, 60.0  # of one warning; more of them are counted and told with the next one
MAX_KINDS = 1000  # of warnings remembered
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {10: "\\n", 13: "\\r", 9: "\\t"}


class Subject(Protocol):
    """What log lines are about."""

    def log_fields(self) -> Mapping[str, Any]: ...


_SUBJECT: ContextVar[Subject | None] = ContextVar("subject", default=None)


@contextlib.contextmanager
def about(subject: Subject) -> Iterator[None]:
    """Lines of this task, and of the tasks it starts, are about this."""
    token = _SUBJECT.set(subject)
    try:
        yield
    finally:
        _SUBJECT.reset(token)


def current_subject() -> Subject | None:
    return _SUBJECT.get()


def set_up(level: LogLevel, form: LogFormat, *, role: str | None = None) -> None:
    """Of this process, and through the environment of the children it starts. Lines go to stderr."""
    os.environ[FORMAT_VARIABLE], os.environ[LEVEL_VARIABLE] = form, level
    handler = _Stderr()
    handler.setFormatter((JsonLines if form == "json" else TextLines)(role))
    handler.addFilter(Repetition())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(OURS).setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _report
    sys.unraisablehook = lambda found: _unseen("an error that nobody could catch", found.exc_value)
    threading.excepthook = lambda found: _unseen("a thread has ended with an error", found.exc_value)


def set_up_child() -> None:
    """As the gateway has told it; its role is the name that the process has when it says something."""
    level, form = os.environ.get(LEVEL_VARIABLE, "warning"), os.environ.get(FORMAT_VARIABLE, "text")
    set_up(level if level in ("debug", "info", "error") else "warning", "json" if form == "json" else "text")  # type: ignore[arg-type]


def belongs_to(domain: str) -> None:
    """From now on this process is a worker of one domain, and says so in every line."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Lines):
            handler.formatter.domain = domain


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What ends the process is a log line like any other."""
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger(OURS).critical("the process ends: %s", kind.__qualname__, exc_info=(kind, error, trace))


def report_unseen(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """For `loop.set_exception_handler`: asyncio's own puts the text of the error into its message."""
    _unseen(f"in the event loop: {context.get('message', 'an error')}", context.get("exception"))


def _unseen(what: str, error: BaseException | None) -> None:
    logging.getLogger(OURS).error("%s", what, exc_info=error, extra={"withhold": True})


class _Stderr(logging.Handler):
    """Wherever sys.stderr leads at the moment: a progress bar moves aside for what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self._outlet = Outlet()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record) + "\n")
        except Exception as error:  # as `handleError` would tell with all arguments
            self._write(f"a line of {record.name} could not be written: {type(error).__name__}\n")

    def _write(self, line: str) -> None:
        stream = sys.stderr
        if stream is not None and stream is not sys.__stderr__:
            stream.write(line)
            stream.flush()
            return
        if self._outlet.lost:
            words = "%d lines of this process are lost, because nobody read them"
            told = logging.makeLogRecord(
                {"name": OURS, "levelno": 30, "levelname": "WARNING", "msg": words, "args": (self._outlet.lost,)}
            )
            if not self._outlet.write(f"{self.format(told)}\n".encode()):
                return
            self._outlet.lost = 0
        self._outlet.write(line.encode("utf-8", "backslashreplace"))


class Repetition(logging.Filter):
    """Lets a warning through REPEATS times in WINDOW_S seconds; how many were held back is told with the next one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, int, str], list[float]] = {}  # window's start, passed, held back

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now = self._clock()
        key = (record.name, record.levelno, str(record.msg))
        window = self._seen.get(key)
        if window is None or now - window[0] >= WINDOW_S:
            if window is not None and window[2]:
                record.repeated = int(window[2])
                del self._seen[key]  # so that the oldest is the one to forget
            elif window is None and len(self._seen) >= MAX_KINDS:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = [now, 1, 0]
            return True
        kind = 1 if window[1] < REPEATS else 2
        window[kind] += 1
        return kind == 1


class _Lines(logging.Formatter):
    def __init__(self, role: str | None = None) -> None:
        super().__init__()
        self._role = role
        self.domain: str | None = None

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Those that are known, in the order of a line."""
        subject = _SUBJECT.get()
        found: dict[str, Any] = {} if self.domain is None else {"domain": self.domain}
        if subject is not None:
            found |= subject.log_fields()
        found |= getattr(record, "fields", {})
        if repeated := getattr(record, "repeated", 0):
            found["repeated"] = repeated
        return found

    def role(self) -> str:
        return self._role or process_role()

    def trace(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return ""
        is_foreign = not record.name.startswith(OURS) or getattr(record, "withhold", False)
        return trace_of(error, with_text=not is_foreign and self.domain is None)


class TextLines(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        words = [f"{_stamp(record)} {record.levelname.lower()} {self.role()}[{record.process}] {record.name}:"]
        words.append(record.getMessage().translate(_ESCAPES))
        words += [f"{name}={str(value).translate(_ESCAPES)}" for name, value in self.fields(record).items()]
        trace = self.trace(record)
        return " ".join(words) + (f"\n{trace}" if trace else "")


class JsonLines(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "role": self.role(),
            "pid": record.process,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if trace := self.trace(record):
            line["exception"] = trace
        return json.dumps(line, default=str)


def trace_of(error: BaseException, *, with_text: bool) -> str:
    """Like Python's own; without the texts of the exceptions if they may quote what a client sent."""
    if with_text:
        return "".join(traceback.format_exception(error)).rstrip()
    parts = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        frames = "".join(traceback.format_tb(cause.__traceback__))
        text = f": {cause}" if _quotes_nothing(cause) else " (its text is not logged)"
        parts.append(f"Traceback (most recent call last):\n{frames}{type(cause).__qualname__}{text}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n\n".join(reversed(parts))


def _quotes_nothing(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return str(error).startswith(SPEAKS_OF_DEVICES)
    return isinstance(error, SPEAKS_OF_CODE)


def process_role() -> str:
    """By the name a process has given itself; a forked one changes it as it goes."""
    try:
        with open("/proc/self/comm") as file:
            name = file.read().strip()
    except OSError:
        return "process"
    return name.removeprefix(ROLE_PREFIX) if name.startswith(ROLE_PREFIX) else "process"


def _stamp(record: logging.LogRecord) -> str:
    """UTC, with milliseconds."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
