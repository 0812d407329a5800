"""What a terminal shows: progress bars, colours, verbosity; plain timed lines in a log, a pipe or CI."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from typing import IO, Any

LOG_EVERY_S = 10.0
"""Between two lines of progress where there is no bar."""
STYLES = {"bold": "1", "green": "32", "yellow": "33", "red": "31", "dim": "2"}

_PAINTED = re.compile(rf"(\x1b\[(?:0|{'|'.join(STYLES.values())})m)")
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal, an editor or a reader of YAML acts on, or shows in another order: control characters but tab and
newline, separators of lines, marks of direction, and halves of characters, which stand for bytes that are no text."""

log = logging.getLogger(__name__)
_output_lost = False


def printable(text: str, *, one_line: bool = False) -> str:
    """A text with what cannot be seen in it written out as its number: a name from a file is a name, and no command.

    Args:
        text: any.
        one_line: newlines and tabs, too.
    """
    text = UNSEEN.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if one_line else text


def show(text: object, *, end: str = "\n") -> None:
    """Print a command's result; control characters that are not our own colours are written out."""
    pieces = _PAINTED.split(str(text)) if has_colours(sys.stdout) else [str(text)]
    safe = (piece if number % 2 else printable(piece) for number, piece in enumerate(pieces))  # odd ones are colours
    try:
        print("".join(safe), end=end, flush=True)  # noqa: T201 - the way out of all results
    except BrokenPipeError:  # whoever read them went away, as `head` does; the work goes on, and the log has all
        _give_up(sys.stdout)
    except OSError as error:  # a file on a full disk
        _lose_output(error)


def tell(text: str) -> None:
    """Print a line to stderr; where that cannot be written to, the exit code speaks."""
    try:
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - what ended the command
    except OSError:
        _give_up(sys.stderr)


def flush_output() -> None:
    """Print what waits to be printed. Raises: BrokenPipeError: Whoever read it went away."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _lose_output(error)


def _lose_output(error: OSError) -> None:
    """Go on without stdout, as to a file on a full disk, and say so."""
    global _output_lost
    _output_lost = True
    log.error("stdout cannot be written to (%s); the rest of the output is lost", error.strerror or error)
    _give_up(sys.stdout)


def is_output_lost() -> bool:
    """Whether a part of a command's result could not be printed."""
    return _output_lost


def _give_up(stream: IO[str]) -> None:
    """Let what is printed from now on go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def has_colours(stream: IO[str]) -> bool:
    """Whether a stream is a terminal with colours and nobody asked for none.

    Source: no-color.org: NO_COLOR, when set and not empty, turns colours off.
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, stream: IO[str]) -> str:
    """A text in a style, where the stream has colours."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if has_colours(stream) else text


def paint_table(text: str, stream: IO[str]) -> str:
    """A table of `ensemble.tables`: its title bold, the chosen row (*) green."""
    lines = text.split("\n")
    if not has_colours(stream):
        return text
    painted = [paint(line, "green", stream) if line.startswith("* ") else line for line in lines[1:]]
    return "\n".join([paint(lines[0], "bold", stream), *painted])


def _pace(rate: float, unit: str) -> str:
    """Units a second as people say it: `3.2 cases/s`, or `41 s a case` where one takes longer than a second."""
    if rate >= 1:
        return f"{rate:.1f} {unit}s/s"
    return f"{1 / rate:.3g} s a {unit}"


def _length(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Progress:
    """How far some work is: a bar with rate and time left on a terminal, else a line from time to time."""

    def __init__(self, name: str, total: float, *, unit: str = "case", shown: bool = True) -> None:
        """Begin.

        Args:
            name: of the work.
            total: units to do; 1 with unit "" for a share.
            unit: what is counted.
            shown: False where nothing is to be seen, as when a command prints JSON.
        """
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.shown = shown and not _is_quiet()
        self.start = self.logged = time.monotonic()
        self.bar: Any = None
        if self.shown and total and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # its thread would keep processes from being forked
            look: dict[str, Any] = {"unit": unit}
            if not unit:
                look["bar_format"] = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=total, desc=name, file=sys.stderr, leave=False, dynamic_ncols=True, **look)

    def step(self) -> None:
        """One more unit is done."""
        self.to(self.done + 1)

    def to(self, done: float, note: str = "") -> None:
        """So much is done.

        Args:
            done: of `total`.
            note: shown beside the bar, such as `step 35`.
        """
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
            self.done = done
            return
        self.done = done
        if self.shown and time.monotonic() - self.logged > LOG_EVERY_S:
            self.logged = time.monotonic()
            rate = self.done / (self.logged - self.start)
            left = _length((self.total - self.done) / rate) + " left" if rate else "none done yet"
            if self.unit:
                pace = f", {_pace(rate, self.unit)}" if rate else ""
                log.info("%s: %d of %d %ss%s, %s", self.name, self.done, self.total, self.unit, pace, left)
            else:
                share = 100 * self.done / self.total
                log.info("%s: %.0f %%%s, %s", self.name, share, f", {note}" if note else "", left)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()


SHOWN_ELSEWHERE = {"is_shown_elsewhere": True}
"""`extra` of a record for the run's log alone, since a command's result says the same."""


class _Handler(logging.Handler):
    """Lines to stderr, above a bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_shown_elsewhere", False):
            return
        try:
            text = self.format(record)
            tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
            if tqdm is not None and getattr(tqdm, "_instances", None):
                tqdm.write(text, file=sys.stderr)
            else:
                tell(text)
        except OSError:  # the reader went away, or it is a file on a full disk; the run's own log has all
            _give_up(sys.stderr)
        except ValueError:  # stderr was closed
            self.handleError(record)


class LineFormatter(logging.Formatter):
    """A line a record, its traceback aside: no name from a file begins a line of its own, or sends a command."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback; `%(mark)s` in a format says of what is no plain word that it is none."""
        record.mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return printable(super().formatMessage(record), one_line=True)

    def formatException(self, ei: Any) -> str:
        """The traceback."""
        return printable(super().formatException(ei))


class _Formatter(LineFormatter):
    """Plain lines; warnings and errors say that they are. Verbose: with time and module."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        style = "red" if record.levelno >= logging.ERROR else "yellow"
        return f"{paint(record.levelname.lower() + ':', style, sys.stderr)} {text}"


def set_up_logging(level: int) -> None:
    """Send the package's log to the terminal, beside a command's own result.

    Args:
        level: logging.WARNING for quiet, INFO, or DEBUG for verbose.
    """
    handler = _Handler()
    handler.setFormatter(_Formatter(verbose=level == logging.DEBUG))
    handler.setLevel(level)
    logger = logging.getLogger("autoseg")
    logger.handlers[:] = [handler]
    logger.setLevel(min(level, logging.INFO))  # a run's own log is whole, however quiet the terminal


def _is_quiet() -> bool:
    """Whether --quiet was given."""
    handlers = [h for h in logging.getLogger("autoseg").handlers if isinstance(h, _Handler)]
    return bool(handlers) and handlers[0].level > logging.INFO


def take_verbosity(words: list[str]) -> int:
    """Take --quiet and --verbose out of a command line's words.

    Returns:
        The level of logging.

    Raises:
        ConfigError: Both are there.
    """
    from autoseg.errors import ConfigError

    flags = [word for word in words if word in ("--quiet", "--verbose")]
    words[:] = [word for word in words if word not in ("--quiet", "--verbose")]
    if len(set(flags)) > 1:
        raise ConfigError("--quiet: contradicts --verbose. Give one of the two.")
    return {"--quiet": logging.WARNING, "--verbose": logging.DEBUG}[flags[0]] if flags else logging.INFO
