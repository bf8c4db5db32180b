"""Which ranks came to a collective: notes in the launcher's key-value store, read when one breaks.

torch's error names a socket; these notes name the rank: each writes down what it starts, and, when something
breaks for it, that it has given up. So a rank that never came and a rank that is stuck inside can both be named.
"""

import time

import torch.distributed as dist

SECONDS_TO_GIVE_UP = 2.0  # the ranks that still run notice within it that a collective has broken
NAMED = 8  # ranks that one message lists


class Attendance:
    """The notes of one process group, as one rank keeps and reads them.

    store: where they are kept, the same for all ranks; rank: this one; world_size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store, self.rank, self.ranks = store, rank, range(world_size)
        self.started = 0  # collectives that this rank has started

    def start(self, name: str) -> None:
        """Note that this rank starts a collective. It waits for nobody: a few microseconds."""
        self.started += 1
        self.store.set(f"started/{self.rank}", f"{self.started} {name}")

    def who_is_missing(self) -> str:
        """After a failure: the ranks that have started fewer collectives than this one, or else are stuck in it."""
        try:
            self.store.set(f"gave_up/{self.rank}", str(self.started))
            behind = self._behind()
            silent = [] if behind else self._silent()
        except RuntimeError:
            return "rank 0 or the launcher, which keeps the notes of all ranks, can't be reached"
        if behind:
            more = f" and {len(behind) - NAMED} more" if len(behind) > NAMED else ""
            return ", ".join(behind[:NAMED]) + more
        if silent:
            more = f" and {len(silent) - NAMED} more" if len(silent) > NAMED else ""
            return f"rank {', '.join(map(str, silent[:NAMED]))}{more} stopped or died in it"
        return "every rank was in it and is still running, so the connection between them is at fault"

    def _behind(self) -> list[str]:
        """A sentence for each rank that has not started what this rank has started last."""
        sentences = []
        for other in self.ranks:
            started, last = (self._read(f"started/{other}") or "0 nothing yet").split(" ", 1)
            if int(started) < self.started:
                sentences.append(f"rank {other} did not arrive (last seen at: {last})")
        return sentences

    def _silent(self) -> list[int]:
        """The ranks that came, but don't say in time that it broke for them, too."""
        until = time.monotonic() + SECONDS_TO_GIVE_UP
        silent = list(self.ranks)
        while silent and time.monotonic() < until:
            time.sleep(0.05)
            silent = [other for other in silent if self._read(f"gave_up/{other}") != str(self.started)]
        return silent

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None
