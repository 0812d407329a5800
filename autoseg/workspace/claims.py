"""Claims: at any moment one process at most works on a thing, on however many machines that share a file system.

A claim is a numbered file in the thing's `.claims` folder; the highest number counts. Its holder renews the file's time
(the heartbeat). Who wants the thing and finds it released, or its holder dead, makes the file of the next number,
which succeeds for one process alone; the old holder, should it only have been frozen, sees the higher number and stops.

Why not `filelock.SoftFileLease` (4.2), which takes over from the dead as surely: it tells whether a holder on another
machine is alive only to who waits a whole lease for it, while `status` and each launcher ask that of all jobs at a
look. Nor does it say who held a thing before, or on which device.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
from pydantic import Field

from autoseg.errors import WorkspaceError
from autoseg.hardware.system import let_go, replace
from autoseg.workspace.files import open_half, open_new, open_regular
from autoseg.workspace.stored import Moment, Stored

log = logging.getLogger(__name__)

BEAT_S = 10.0
"""Seconds between two heartbeats."""
STALE_S = 120.0
"""Seconds without a heartbeat after which a holder counts as dead. Twice the minute for which NFS clients may show
old file times (`acregmax`, nfs(5))."""
HEARTBEAT = "heartbeat of"
"""How the names of the threads begin that keep claims alive."""
_CLAIM = re.compile(r"([0-9]{6,18})\.json")
POLL_S = 1.0
"""Seconds between two looks at a claim that is waited for."""


class Busy(WorkspaceError):
    """Another live process holds the claim."""


class LostClaim(WorkspaceError):
    """This process was silent for so long that another one took over; it must write nothing more."""


class Holder(Stored):
    """Who holds, or last held, a claim."""

    host: str
    space: str
    """The process numbers' name space, so that containers of one host name are told apart."""
    pid: int = Field(ge=0, le=2**31 - 1)
    born: float
    """When the process began, so that a reused number is not taken for it."""
    device: str = ""
    since: Moment = 0.0
    """When it was claimed, in seconds since 1970."""
    released: bool = False

    @property
    def name(self) -> str:
        """As a person would say it."""
        return f"process {self.pid} on {self.host}"

    def is_gone(self) -> bool:
        """Whether it is known to be dead: only of processes of this machine can that be said."""
        if (self.host, self.space) != _here():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.born) > 1.0
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True, slots=True)
class ClaimState:
    """What the files say."""

    number: int
    """Of the claim that counts; 0: never claimed."""
    holder: Holder | None
    silent_s: float = 0.0
    """Seconds since the last heartbeat."""
    is_live: bool = False
    """Held by a process that is alive as far as can be told."""


def _here() -> tuple[str, str]:
    """This machine and name space of process numbers."""
    try:
        space = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        space = ""
    return socket.gethostname(), space


def read_claim(folder: Path, *, stale_s: float | None = None) -> ClaimState:
    """Tell who holds the claims folder of a thing.

    Args:
        folder: The thing's `.claims`; it need not exist.
        stale_s: Seconds of silence after which a holder is dead; None: `STALE_S`.
    """
    while True:
        number = max(_numbers(folder), default=0)
        if not number:
            return ClaimState(0, None)
        path = _path(folder, number)
        try:
            silent_s = max(0.0, _now(folder) - os.lstat(path).st_mtime)
            with open_regular(path, follow=False) as file:
                text = file.read()
        except FileNotFoundError:  # a higher one has come
            continue
        except OSError:  # not to be read, or no file
            text = b""
        try:
            holder = Holder.model_validate_json(text)
        except ValueError:  # being written where files cannot be made whole at once
            return ClaimState(number, None, silent_s, silent_s < (stale_s or STALE_S))
        live = not holder.released and silent_s < (stale_s or STALE_S) and not holder.is_gone()
        return ClaimState(number, holder, silent_s, live)


def _numbers(folder: Path) -> list[int]:
    try:
        # Tools that synchronise folders leave copies of other names, such as "000001 (conflicted copy).json".
        return [int(match[1]) for entry in os.scandir(folder) if (match := _CLAIM.fullmatch(entry.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def _now(folder: Path) -> float:
    """The time by the clock that stamps the folder's files, which may be another machine's."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
    except OSError:  # read only: our own clock has to do
        return time.time()


class Claim:
    """The right to work on one thing, kept alive by a thread; use as a context manager.

    Args:
        folder: The thing's `.claims`; made where it is missing.
        what: Name of the thing, for messages.
        device: What the holder works on, for `autoseg status`.
        wait: Wait while another holds it, instead of raising `Busy`.
        beat_s, stale_s: None: `BEAT_S`, `STALE_S`.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        *,
        device: str = "",
        wait: bool = False,
        poll_s: float = POLL_S,
        beat_s: float | None = None,
        stale_s: float | None = None,
    ) -> None:
        self.folder, self.what, self.device, self.wait, self.poll_s = folder, what, device, wait, poll_s
        self.beat_s, self.stale_s = beat_s or BEAT_S, stale_s or STALE_S
        self.number = 0
        self.before = ClaimState(0, None)
        """How the thing was found."""
        self._stop = threading.Event()
        self._lost = False

    def __enter__(self) -> Claim:
        """Claim the thing.

        Raises:
            Busy: A live process holds it, and `wait` is not set.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        said = False
        while not self._take():
            if not self.wait:
                raise Busy(self._who())
            if not said and self.poll_s >= POLL_S:
                log.info("%s Waiting for it.", self._who())
                said = True
            time.sleep(self.poll_s)
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"{HEARTBEAT} {self.what}")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self.is_held():
            with self._written(released=True) as half:
                replace(half, _path(self.folder, self.number))

    def is_held(self) -> bool:
        """Whether this process is still the holder."""
        self._lost = self._lost or max(_numbers(self.folder), default=0) != self.number
        return not self._lost

    def check(self) -> None:
        """Raise where the claim was lost; to be called before anything is written.

        Raises:
            LostClaim: Another process took over.
        """
        if not self.is_held():
            state = read_claim(self.folder)
            by = state.holder.name if state.holder else "another process"
            raise LostClaim(
                f"{self.what}: this process was silent for over {self.stale_s:.0f} s and {by} took over. It stops here."
            )

    def _take(self) -> bool:
        state = read_claim(self.folder, stale_s=self.stale_s)
        if state.is_live:
            return False
        number = state.number + 1
        with self._written() as half:
            try:
                os.link(half, _path(self.folder, number))  # whole at once, and for one process alone
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                try:
                    with open_new(_path(self.folder, number)) as file:
                        file.write(half.read_bytes())
                except FileExistsError:
                    return False
        if max(_numbers(self.folder)) != number:  # we looked long ago; others have come and gone since
            _path(self.folder, number).unlink(missing_ok=True)
            return False
        for old in _numbers(self.folder):
            if old < number:
                _path(self.folder, old).unlink(missing_ok=True)
        self.number, self.before = number, state
        return True

    @contextmanager
    def _written(self, *, released: bool = False) -> Iterator[Path]:
        """A new file in the folder that says who holds it; moved or gone at the end."""
        host, space = _here()
        holder = Holder(
            host=host,
            space=space,
            pid=os.getpid(),
            born=psutil.Process().create_time(),
            device=self.device,
            since=time.time(),
            released=released,
        )
        half, file = open_half(self.folder / "claim")
        try:
            with file:
                file.write(holder.model_dump_json().encode())
                file.flush()
                let_go(file)
                yield half
        finally:
            half.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_s):
            if not self.is_held():
                return
            try:
                os.utime(_path(self.folder, self.number))
            except OSError as error:  # a server that is away for a moment; the next beat may come through
                log.warning("%s: no heartbeat could be written (%s)", self.what, error.strerror or error)

    def _who(self) -> str:
        state = read_claim(self.folder, stale_s=self.stale_s)
        if state.holder is None:
            return f"{self.what}: another process is working on it."
        at = time.strftime("%H:%M:%S", time.localtime(state.holder.since))
        return (
            f"{self.what}: {state.holder.name} is working on it since {at}, last heartbeat {state.silent_s:.0f} s ago "
            f"(taken over after {self.stale_s:.0f} s)."
        )
