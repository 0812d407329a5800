"""One process at most holds a claim, whatever dies, sleeps or races."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autoseg.workspace.claims import Busy, Claim, LostClaim, read_claim

RACER = """
import os, sys, time
from pathlib import Path
from autoseg.workspace.claims import Busy, Claim
folder, inside, until = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0.0, until - time.time()))
won = 0
while time.time() < until + 1.5:
    try:
        with Claim(folder, "thing"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))   # fails where another is inside
            won += 1
            inside.unlink()
    except Busy:
        pass
print(won)
"""


def test_racing_processes_never_hold_it_together(tmp_path: Path) -> None:
    begin = str(time.time() + 1.5)
    command = [sys.executable, "-c", RACER, str(tmp_path / "claims"), str(tmp_path / "inside"), begin]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    told = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 6
    assert sum(int(text) for text in told) >= 6
    assert len(list((tmp_path / "claims").iterdir())) == 1, "old claims and parts are cleared away"


def test_threads_that_start_together_get_it_once(tmp_path: Path) -> None:
    for attempt in range(20):
        folder, got, ready = tmp_path / str(attempt), [], threading.Barrier(8)
        folder.mkdir()

        def take(folder: Path = folder, got: list = got, ready: threading.Barrier = ready) -> None:  # type: ignore[type-arg]
            claim = Claim(folder, "thing")
            ready.wait()
            if claim._take():
                got.append(claim)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1


def hold(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that holds a claim until it is killed."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom autoseg.workspace.claims import Claim\n"
        f"with Claim(Path(sys.argv[1]), 'segresnet_0', device='cuda:3'{''.join(arguments)}):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_busy_tells_who_and_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    state = read_claim(tmp_path)
    assert state.is_live
    assert state.holder is not None
    assert state.holder.device == "cuda:3"
    with pytest.raises(Busy) as busy, Claim(tmp_path, "segresnet_0"):
        pass
    at = time.strftime("%H:%M:%S", time.localtime(state.holder.since))
    assert str(busy.value) == (
        f"segresnet_0: process {holder.pid} on {socket.gethostname()} is working on it since {at}, "
        "last heartbeat 0 s ago (taken over after 120 s)."
    )
    holder.kill()
    holder.communicate()
    with Claim(tmp_path, "segresnet_0") as claim:
        assert claim.before.holder is not None
        assert claim.before.holder.pid == holder.pid
        assert not claim.before.is_live
        assert claim.number == 2


def test_a_released_claim_is_free(tmp_path: Path) -> None:
    with Claim(tmp_path, "a"):
        assert read_claim(tmp_path).is_live
    assert not read_claim(tmp_path).is_live
    with Claim(tmp_path, "a"):
        pass


def test_silence_means_death_only_after_the_limit(tmp_path: Path) -> None:
    """A holder on another machine: only the age of its heartbeat can be seen."""
    with Claim(tmp_path, "a") as claim:
        path = next(tmp_path.glob("*.json"))
        path.write_text(path.read_text().replace(socket.gethostname(), "another-machine"))
        claim._stop.set()
        os.utime(path, (time.time() - 60, time.time() - 60))
        with pytest.raises(Busy), Claim(tmp_path, "a"):
            pass
        os.utime(path, (time.time() - 130, time.time() - 130))
        with Claim(tmp_path, "a") as second:
            assert second.number == 2
            assert not claim.is_held()


def test_a_frozen_holder_is_taken_over_and_stops(tmp_path: Path) -> None:
    holder = hold(tmp_path, ", beat_s=0.1, stale_s=0.8")
    time.sleep(1.5)
    with pytest.raises(Busy), Claim(tmp_path, "segresnet_0", stale_s=0.8):
        pass
    holder.send_signal(signal.SIGSTOP)
    try:
        with Claim(tmp_path, "segresnet_0", wait=True, poll_s=0.1, stale_s=0.8) as claim:
            holder.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            assert claim.is_held(), "the old holder's beats do not count any more"
    finally:
        holder.kill()
        holder.communicate()


def test_a_lost_claim_is_said(tmp_path: Path) -> None:
    with Claim(tmp_path, "segresnet_0", stale_s=0.2) as claim:
        claim._stop.set()
        time.sleep(0.5)
        by = f"process {os.getpid()} on {socket.gethostname()}"
        with Claim(tmp_path, "segresnet_0", stale_s=0.2):
            with pytest.raises(LostClaim) as lost:
                claim.check()
            assert str(lost.value) == (
                f"segresnet_0: this process was silent for over 0 s and {by} took over. It stops here."
            )
    assert not read_claim(tmp_path).is_live


def test_waiting_ends_when_it_is_free(tmp_path: Path) -> None:
    with Claim(tmp_path, "a"):
        begin = time.monotonic()
        other = Claim(tmp_path, "a", wait=True, poll_s=0.05)
        got: list[float] = []

        def wait() -> None:
            with other:
                got.append(time.monotonic() - begin)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.4)
        assert not got
    thread.join(5)
    assert 0.4 <= got[0] < 1.5
