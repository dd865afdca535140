"""A training that torchrun starts again goes on with what it began: until it ends, a run's folder tells who began what.

Whoever is started again has the arguments of the first time, "train book.txt --out run" or "train --resume run --steps 1000", and
no other way to tell a run of its own from somebody else's, or the thousand steps that it began from another thousand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from throughtime.launch import launched
from throughtime.lm.run import JOB
from throughtime.training import LostRankError, Ranks
from throughtime.training.checkpoint import load_json, save_json
from throughtime.training.files import CheckpointError
from throughtime.training.ranks import SaidElsewhereError


class Job(NamedTuple):
    """What torchrun was told to train.

    Attributes:
        agents: Which of its programs started the processes; empty where they wouldn't be started again.
        is_restarted: Whether they were.
    """

    agents: tuple[str, ...] = ()
    is_restarted: bool = False

    @classmethod
    def of(cls, ranks: Ranks) -> "Job":
        """Return the job of these processes, all of which have to ask."""
        launch = launched()
        return cls(tuple(ranks.agents()), ranks.total(launch.restarts) > 0) if launch.most_restarts else cls()

    def began(self, folder: str | Path) -> int | None:
        """Return after how many steps of a run this job began, before it was started again; `None` if it didn't."""
        if not self.is_restarted:
            return None
        try:
            there = load_json(Path(folder) / JOB, sealed=True)
        except CheckpointError:
            return None
        agents, steps = there.get("agents"), there.get("steps")
        is_ours = isinstance(agents, list) and bool(set(map(str, agents)) & set(self.agents))
        return steps if is_ours and isinstance(steps, int) else None

    @contextmanager
    def begins(self, folder: Path, steps: int) -> Iterator[None]:
        """Have a folder tell that this job trains there, from so many steps on, until it ends otherwise than by a lost process."""
        if not self.agents:
            yield
            return
        save_json(folder / JOB, {"agents": list(self.agents), "steps": steps}, sealed=True)
        try:
            yield
        except (LostRankError, SaidElsewhereError):
            raise
        except BaseException:
            (folder / JOB).unlink(missing_ok=True)
            raise
        (folder / JOB).unlink(missing_ok=True)
