"""One process at most holds a claim, whatever dies, sleeps or races."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import wait_for

from autoseg.workspace.claims import Busy, Claim, LostClaim, read_claim

RACER = """
import os, sys
from pathlib import Path
from autoseg.workspace.claims import Busy, Claim
folder, inside = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
won = 0
while won < 20:
    try:
        with Claim(folder, "thing"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))   # fails where another is inside
            won += 1
            inside.unlink()
    except Busy:
        pass
"""


def test_racing_processes_never_hold_it_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path / "claims"), str(tmp_path / "inside")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(6)]  # type: ignore[call-overload]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 6
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate()
    assert [racer.returncode for racer in racers] == [0] * 6
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
    """A process that holds a claim until it is killed or loses it."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom autoseg.workspace.claims import Claim\n"
        f"with Claim(Path(sys.argv[1]), 'segresnet_0', device='cuda:3'{''.join(arguments)}) as claim:\n"
        "    print('held', flush=True)\n"
        "    while claim.is_held():\n        time.sleep(0.02)\n"
        "print('lost', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def fall_silent(folder: Path, seconds: float = 130.0) -> Path:
    """Make the last heartbeat as old as that of a holder that was silent for so long; returns the claim's file."""
    path = max(folder.glob("*.json"))
    os.utime(path, (time.time() - seconds, time.time() - seconds))
    return path


def test_busy_tells_who_and_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    state = read_claim(tmp_path)
    assert state.is_live
    assert state.holder is not None
    assert state.holder.device == "cuda:3"
    with pytest.raises(Busy) as busy, Claim(tmp_path, "segresnet_0"):
        pass
    at = time.strftime("%H:%M:%S", time.localtime(state.holder.since))
    assert re.fullmatch(
        rf"segresnet_0: process {holder.pid} on {socket.gethostname()} is working on it since {at}, "
        r"last heartbeat \d+ s ago \(taken over after 120 s\)\.",
        str(busy.value),
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
    with Claim(tmp_path, "a", beat_s=3600) as claim:
        path = next(tmp_path.glob("*.json"))
        path.write_text(path.read_text().replace(socket.gethostname(), "another-machine"))
        fall_silent(tmp_path, 60.0)
        with pytest.raises(Busy), Claim(tmp_path, "a"):
            pass
        fall_silent(tmp_path)
        with Claim(tmp_path, "a") as second:
            assert second.number == 2
            assert not claim.is_held()


def test_a_holder_in_another_container_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Two containers may have one host name; the number of a process means another one in each, or none."""
    with Claim(tmp_path, "a", beat_s=3600):
        path = next(tmp_path.glob("*.json"))
        stored = {**json.loads(path.read_text()), "born": 1.0}  # here, its number is another process'
        path.write_text(json.dumps({**stored, "space": "4026531836000"}))
        assert read_claim(tmp_path).is_live
        with pytest.raises(Busy), Claim(tmp_path, "a"):
            pass
        path.write_text(json.dumps(stored))
        assert not read_claim(tmp_path).is_live


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no process can be frozen on Windows")
def test_a_frozen_holder_is_taken_over_and_stops(tmp_path: Path) -> None:
    holder = hold(tmp_path, ", beat_s=0.05")
    path = fall_silent(tmp_path, 60.0)
    wait_for(lambda: read_claim(tmp_path).silent_s < 50.0)  # its heartbeat goes on
    holder.send_signal(signal.SIGSTOP)
    os.waitpid(holder.pid, os.WUNTRACED)
    try:
        fall_silent(tmp_path)
        with Claim(tmp_path, "segresnet_0") as claim:
            assert claim.before.holder is not None
            assert claim.before.holder.pid == holder.pid
            holder.send_signal(signal.SIGCONT)
            assert holder.stdout is not None
            assert holder.stdout.readline() == "lost\n"
            assert claim.is_held(), "the old holder's beats do not count any more"
            assert not path.exists()
    finally:
        holder.kill()
        holder.communicate()


def test_a_lost_claim_is_said(tmp_path: Path) -> None:
    with Claim(tmp_path, "segresnet_0", beat_s=3600) as claim:
        fall_silent(tmp_path)
        by = f"process {os.getpid()} on {socket.gethostname()}"
        with Claim(tmp_path, "segresnet_0"):
            with pytest.raises(LostClaim) as lost:
                claim.check()
            assert str(lost.value) == (
                f"segresnet_0: this process was silent for over 120 s and {by} took over. It stops here."
            )
    assert not read_claim(tmp_path).is_live


def test_waiting_ends_when_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Claim(tmp_path, "a")
    held.__enter__()
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            held.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", sleep)
    with Claim(tmp_path, "a", wait=True, poll_s=0.05) as claim:
        assert claim.is_held()
    assert looks == [0.05] * 3
