"""What interrupts a run: signals that all ranks agree on, a watchdog that names late ranks.

SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone) and SIGUSR1 (Slurm's warning) end a run in
good order. The first signal only sets a flag. All ranks learn of it one step later, save a
checkpoint at the same step and leave with exit code 0. A later signal ends the process at once,
which leaves every file whole, since files are renamed into place.
"""

import os
import shlex
import signal
import sys
import threading
import time

from runtime import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Slurm signals torchrun and its workers, and torchrun passes it on: within this many seconds it is
# the same signal delivered twice.
SAME_SIGNAL_S = 2.0
FAILED = 1000  # not a signal: one rank cannot continue, so all stop

# Where a rank is within a step, for the watchdog.
EVALUATING, READING, COMPUTING = range(3)
PLACES = ("evaluating or saving", "reading its batch", "computing")


class Stop:
    """Whether any rank must stop. Every rank calls it equally often, and all get the same answer.

    agreed: 0 to go on; otherwise what all ranks know of: a signal's number, or FAILED.
    parts: objects that can fail on this rank and then say why in their `failure` (a full disk).
    reason: why this rank cannot go on, where it is none of these parts.
    """

    def __init__(self, timeout_s: float):
        self.received, self.received_at = 0, 0.0
        self.agreed = 0
        self.agree = distributed.Agreement(timeout_s)
        self.parts, self.reason = [], ""
        for number in SIGNALS:
            # nohup makes a run go on after SIGHUP. Not under torchrun: it passes the signal on and
            # kills its workers 30 seconds later, nohup or not.
            is_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not is_nohup or "TORCHELASTIC_RUN_ID" in os.environ:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            if distributed.ranks().rank == 0:
                name = signal.Signals(number).name
                message = f"\n{name}: stopping with a checkpoint; once more stops at once\n"
                os.write(2, message.encode())  # not print: the signal may interrupt another print
        elif time.monotonic() - self.received_at > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __call__(self) -> int:
        offered = FAILED if self.failure else self.received
        self.agreed = self.agreed or self.agree(offered)
        return self.agreed

    @property
    def failure(self) -> str:
        """Why this rank cannot go on; "" if it can."""
        if self.reason:
            return self.reason
        for part in self.parts:
            if part.failure:
                return part.failure
        if self.agreed == FAILED:
            return "another rank cannot go on; its own error says why"
        return ""

    @property
    def name(self) -> str:
        """Of the signal that all ranks agreed on."""
        return signal.Signals(self.agreed).name


def command() -> str:
    """What was typed to start this run; torchrun's flags for several nodes are not known here."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python {shlex.join(sys.argv)}"
    ranks_per_node = os.environ["LOCAL_WORLD_SIZE"]
    nodes = distributed.ranks().world_size // int(ranks_per_node)
    node_flags = f"--nnodes {nodes} ... " if nodes > 1 else ""
    return f"torchrun {node_flags}--nproc_per_node {ranks_per_node} -- {shlex.join(sys.argv)}"


class Watchdog:
    """Reports on rank 0 which ranks are behind the others, and for how long.

    The main loop calls `at`. A thread of each rank writes the rank's position to the store by which
    the ranks found each other, which works even while a collective hangs. A hung or dead rank stops
    updating its entry.

    A position is step * 3 + place, so that it grows as the rank advances.
    """

    def __init__(self, step: int, timeout_s: float):
        self.position = step * len(PLACES)
        self.late_s = timeout_s / 20
        self.ended = threading.Event()
        self.reported: dict[int, float] = {}  # rank -> after how many seconds it was reported last
        self.positions: dict[int, tuple] = {}  # rank -> (position, when it last changed)
        self.beats: dict[int, tuple] = {}  # rank -> (beat, when it last changed)
        self.store = distributed.shared_store("watchdog")
        if self.store:
            self._write(0)
            distributed.wait_for_all()  # from here on every entry exists
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def at(self, step: int, place: int) -> None:
        """This rank has reached PLACES[place] of a step."""
        self.position = step * len(PLACES) + place

    def close(self) -> None:
        self.ended.set()
        if self.store:
            self.thread.join(timeout=10)  # or it might use the store while the process ends

    def _write(self, beat: int) -> None:
        self.store.set(str(distributed.ranks().rank), f"{self.position} {beat}")

    def _run(self) -> None:
        beat = 0
        rank, _, world_size = distributed.ranks()
        keys = [str(r) for r in range(world_size)]
        while not self.ended.wait(self.late_s / 5):
            beat += 1
            try:
                self._write(beat)
                if rank == 0:
                    self._report(self.store.multi_get(keys))
            except RuntimeError:  # the store's process is gone, and torchrun is stopping all
                return

    def _report(self, entries: list[bytes]) -> None:
        """Print a line for each rank that is late: "POSITION BEAT" of each rank, in order."""
        now = time.monotonic()
        parsed = [tuple(map(int, entry.split())) for entry in entries]
        furthest = max(position for position, _ in parsed)
        for rank, (position, beat) in enumerate(parsed):
            waited = now - time_of_change(self.positions, rank, position, now)
            silent = now - time_of_change(self.beats, rank, beat, now) > self.late_s
            is_late = waited >= self.late_s and (position < furthest or silent)
            if not is_late:
                self.reported[rank] = self.late_s / 2
            elif waited > 2 * self.reported[rank]:  # report again after twice the time
                self.reported[rank] = waited
                others = f"others {describe(furthest)}"
                why = "and its process gives no sign" if silent else others
                line = f"rank {rank} is late: {describe(position)} since {waited:.0f} s, {why}"
                print(line, file=sys.stderr, flush=True)


def time_of_change(seen: dict[int, tuple], rank: int, value: int, now: float) -> float:
    """When a rank's value last changed; remembers the value."""
    if seen.get(rank, (None, now))[0] != value:
        seen[rank] = (value, now)
    return seen[rank][1]


def describe(position: int) -> str:
    step, place = divmod(position, len(PLACES))
    return f"{PLACES[place]} at step {step}"
