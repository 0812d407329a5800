"""The commands. Each checks its words, then calls one function; no logic lives here.

Exit codes: 0 done; 1 a job failed, or a bug (with its traceback); 2 something the user can repair; 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import TracebackType

from autoseg.cli.arguments import Call, command_help, command_names, parse, parsers, program_help
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.errors import MACHINES_FAULTS, AutosegError, ResourceError
from autoseg.hardware.user import name_user
from autoseg.terminal import flush_output, is_output_lost, paint, printable, set_up_logging, take_verbosity, tell
from autoseg.version import __version__

SPIN_COUNT = "20000"
"""Turns that a thread of OpenMP waits for the others before it sleeps. By default it waits on and on, and takes the
processor from the thread that it waits for where anything else runs, too: with one other busy process on two cores a
training step took 7.1 s where it takes 0.32 s alone. With this it took 1.7 s, and 0.33 s alone (docs/results.md)."""

LEAST_ADDRESSES_BYTES = 3 << 29
"""Below this, PyTorch cannot be loaded, or dies without a word that could be caught. Measured: two jobs on tiny images
were trained with 1.4 GiB and failed with 1.35."""
NO_ROOM = ("can't start new thread", "failed to map segment")
"""What Python and the loader of libraries say where memory, addresses or threads ran out, beside MemoryError."""

TITLE = "autoseg: AutoML for 3D medical image segmentation."


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a bug's traceback and ask for a report; Python then exits with 1."""
    if kind is KeyboardInterrupt:  # a second one, while the first was being told
        return
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
    print(
        f"This is a bug in autoseg {__version__}, not in your data. Please report it with the lines above.",
        file=sys.stderr,
    )


def _keep_interrupt(lost: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C again where it came while Python ran a callback of its own, in which it cannot be raised.

    torch has so many of these (of weak references) that one in ten was lost while plans were made.
    """
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _interrupt_again).start()  # once the callback is over
    else:
        sys.__unraisablehook__(lost)


def _interrupt_again() -> None:
    from autoseg.hardware.system import interrupt_main_thread  # here: what it imports would slow the help

    interrupt_main_thread()


def _execute(call: Call) -> int:
    """Run a checked call through Fire, every text read by its parameter's type."""
    from fire import Fire
    from fire.decorators import SetParseFns

    function = getattr(Commands, call.command)
    SetParseFns(**parsers(function))(function)
    words = [call.command, *(f"--{key}={text}" for key, text in call.arguments.items())]
    code: int = Fire(Commands(call.overrides), command=words, name="autoseg", serialize=lambda _: None)
    return code


def _check_addresses() -> None:
    """Refuse a limit of addresses with which nothing can work, before PyTorch is loaded.

    Raises:
        ResourceError: It is too low.
    """
    from autoseg.hardware.system import address_space_limit_bytes

    limit = address_space_limit_bytes()
    if limit is not None and limit < LEAST_ADDRESSES_BYTES:
        raise ResourceError(
            f"the address space of this process is limited to {limit / 2**30:.2f} GiB (ulimit -v). Loading PyTorch "
            f"takes {LEAST_ADDRESSES_BYTES / 2**30:.1f} GiB, images take more, and a GPU tens of GiB. "
            "Say `ulimit -v unlimited`, or ask the batch system for more memory."
        )


def _told_shortage(error: Exception) -> str | None:
    """What to tell of an error that says that memory or threads ran out; None for any other error."""
    if isinstance(error, MemoryError) or _is_torchs(error) or (isinstance(error, SystemError) and _has_address_limit()):
        return f"memory ran out. {MACHINES_FAULTS[errno.ENOMEM]}"
    if any(words in str(error) for words in NO_ROOM):
        return f"{error}. Allow more processes (ulimit -u) and more addresses (ulimit -v)."
    return None


def _is_torchs(error: Exception) -> bool:
    """Whether it is PyTorch, once loaded, that says that memory ran out."""
    if "torch" not in sys.modules:
        return False
    from autoseg.hardware.memory import is_out_of_memory

    return is_out_of_memory(error)


def _has_address_limit() -> bool:
    from autoseg.hardware.system import address_space_limit_bytes

    return address_space_limit_bytes() is not None


def run_command(argv: Sequence[str]) -> int:
    """Do what the words say and return the exit code; a bug's exception passes through."""
    if "--version" in argv[:1]:
        print(f"autoseg {__version__}")
        return 0
    named = next((word.replace("-", "_") for word in argv if not word.startswith("-")), "")
    wants_help = "--help" in argv or "-h" in argv
    if not argv or (wants_help and named not in command_names(Commands)):
        print(program_help(Commands, TITLE, TAKES_SETTINGS))
        return 0
    if wants_help:
        print(command_help(Commands, named, TAKES_SETTINGS))
        return 0
    words = list(argv)
    try:
        set_up_logging(take_verbosity(words))
        _check_addresses()
        return _execute(parse(Commands, TAKES_SETTINGS, words))
    except AutosegError as error:
        for message in error.messages:
            tell(f"{paint('error:', 'red', sys.stderr)} {printable(message, one_line=True)}")
        return 2
    except OSError as error:
        if error.errno not in MACHINES_FAULTS:
            raise
        name = error.filename2 or error.filename  # the second is where a file was to be moved to
        place = printable(f"{name}: ", one_line=True) if name else ""
        reason, advice = error.strerror, MACHINES_FAULTS[error.errno]
        tell(f"{paint('error:', 'red', sys.stderr)} {place}{reason}. {advice}")
        return 2
    except (MemoryError, SystemError, RuntimeError, ImportError) as error:
        shortage = _told_shortage(error)
        if shortage is None:
            raise
        tell(f"{paint('error:', 'red', sys.stderr)} {printable(shortage)}")
        return 2
    except KeyboardInterrupt:
        tell("interrupted. The same command goes on from here.")
        return 130


def _make_streams_usable() -> None:
    """Let any text be printed in any locale, and nothing at all where stdout or stderr are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by >&-; the next file that is opened must not take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Entry point of the `autoseg` command."""
    sys.excepthook, sys.unraisablehook = _report_bug, _keep_interrupt
    # Imports are most of a short command: half a million objects that live to its end. Looking among them for garbage,
    # and looking for plugins of pydantic, of which none is wanted, took a tenth of a second each.
    gc.set_threshold(100_000)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is loaded, here and in every process that this one starts
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    _make_streams_usable()
    name_user()
    try:
        code = run_command(sys.argv[1:])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C finds nothing to interrupt
        flush_output()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    gc.freeze()  # Python's own end need not look for garbage either
    raise SystemExit(code or int(is_output_lost()))
