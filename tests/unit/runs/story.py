"""Stories of attempts: ledger lines, error reports and logs as the processes of a run leave them."""

from __future__ import annotations

import json
from typing import Any

from launcher.runs.folder import RunFolder, append_json_line, write_json


class Story:
    """Tells what happened to a run, in order, by writing its files."""

    def __init__(self, run: RunFolder, *, job_id: str = "5", cluster: str = "slurm", world_size: int = 4) -> None:
        self.run, self.job_id, self.world_size = run, job_id, world_size
        self.restart = 0
        self.clock_s = 1_000.0
        request = {"cluster": cluster, "signal_lead_s": 60, "mem": "4G"}
        write_json(run.job, {"job_id": job_id, "submitted_s": 1.0, "process": None, "request": request})
        self.tell("submitted", job_id=job_id, cluster=cluster)

    @property
    def attempt(self) -> str:
        """The attempt that is being told."""
        return f"{self.job_id}.{self.restart}"

    def tell(self, event: str, **facts: Any) -> Story:
        """One line of the ledger."""
        self.clock_s += 1
        append_json_line(self.run.attempts, {"event": event, "time_s": self.clock_s, "host": "login", **facts})
        return self

    def starts(self, *, resumed: int | None = None, hosts: tuple[str, ...] = ("node1", "node2")) -> Story:
        """The ranks of the attempt begin; `resumed`: step of the checkpoint they go on from."""
        names = {"job_id": self.job_id, "attempt": self.attempt}
        self.tell("started", **names, world_size=self.world_size, hosts=[hosts[0]])
        self.tell("joined", **names, hosts=list(hosts))
        if resumed is not None:
            self.tell("resumed", **names, step=resumed, checkpoint=f"step-{resumed:06d}")
        return self

    def saves(self, step: int) -> Story:
        """A checkpoint, on disk and in the ledger."""
        self.run.checkpoint(step).mkdir(parents=True, exist_ok=True)
        return self.tell("saved", job_id=self.job_id, attempt=self.attempt, step=step, seconds=0.1)

    def stops(self, step: int, reason: str = "SIGUSR2") -> Story:
        """The ranks agree to stop, save and leave."""
        self.saves(step)
        return self.tell("stopped", job_id=self.job_id, attempt=self.attempt, step=step, reason=reason)

    def reports(self, rank: int, kind: str, message: str = "", **facts: Any) -> Story:
        """What one rank (or its supervisor) writes about its end."""
        self.clock_s += 1
        path = self.run.error(self.attempt, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "type": kind,
            "message": message,
            "rank": rank,
            "host": f"node{rank // 2 + 1}",
            "attempt": self.attempt,
            "time_s": self.clock_s,
            "phase": "training",
            "step": 25,
        }
        path.write_text(json.dumps(document | facts))
        return self

    def hangs(self, rank: int, why: str) -> Story:
        """What the supervisors agree on about a silent rank."""
        folder = self.run.errors / self.attempt
        folder.mkdir(parents=True, exist_ok=True)
        document = {"rank": rank, "host": f"node{rank // 2 + 1}", "why": why, "time_s": self.clock_s, "step": 25}
        (folder / "hung.json").write_text(json.dumps(document))
        return self

    def logs(self, *lines: str, rank: int = 0) -> Story:
        """Lines in a log; rank 0 shares its with the batch script, srun and slurmstepd."""
        path = self.run.log(self.job_id, rank)
        with path.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
        return self

    def again(self) -> Story:
        """Slurm starts the job once more."""
        self.restart += 1
        return self.logs(f"launcher: attempt {self.attempt}")
