"""The ways a job comes back: put back by scontrol, or followed by another job; each asked for once."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import TemporaryError
from launcher.runs.request import request_from_json, request_to_json
from launcher.runs.requeue import RefusedError, follow_up, nodes_there, put_back, stored_request
from tests.unit.runs.material import FakeSlurm, make_request, make_run, note_job

DISABLED = "Requested operation is presently disabled for job 5"


def test_put_back_asks_once(fake_slurm: FakeSlurm) -> None:
    """Slurm's yes is enough."""
    put_back("5", patience_s=10)
    assert fake_slurm.calls("scontrol") == [["requeue", "5"]]


def test_a_refusal_is_not_asked_again(fake_slurm: FakeSlurm) -> None:
    """Slurm's no is final, and its words are kept."""
    fake_slurm.say("scontrol", stderr=DISABLED, status=1)
    with pytest.raises(RefusedError, match="presently disabled"):
        put_back("5", patience_s=10)
    assert len(fake_slurm.calls("scontrol")) == 1


def test_silence_is_asked_again_until_patience_ends(fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that restarts is waited for, not for ever."""
    monkeypatch.setattr("launcher.runs.requeue._FIRST_PAUSE_S", 0.05)
    fake_slurm.say("scontrol", stderr="Unable to contact slurm controller (connect failure)", status=1)
    with pytest.raises(TemporaryError):
        put_back("5", patience_s=0.3)
    assert len(fake_slurm.calls("scontrol")) > 1


def test_no_scontrol_is_a_refusal(no_slurm: object) -> None:
    """Containers and some nodes have none; a new job may still be sent."""
    with pytest.raises(RefusedError, match="no scontrol"):
        put_back("5", patience_s=10)


def test_a_follow_up_waits_for_the_job_and_keeps_its_options(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """The same request with a dependency in place of an older one; excluded nodes add up."""
    run = make_run(tmp_path)
    note_job(run, "5")
    fake_slurm.say("sbatch", "Submitted batch job 6\n")
    extra = {"dependency": "afterok:1", "exclude": "n1,n2", "mail-type": "END"}
    assert follow_up(make_request(run.path, extra=extra), after="5", exclude=("n2", "n3")) == "6"
    lines = [line for line in fake_slurm.script.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --dependency=afterany:5", "#SBATCH --exclude=n1,n2,n3", "#SBATCH --mail-type=END"} <= set(lines)
    assert len([line for line in lines if "dependency" in line]) == 1


@pytest.mark.parametrize(("said", "nodes"), [("3\n1\n", 4), ("", None), ("many\n", None), ("0\n", 0)])
def test_nodes_of_a_partition(fake_slurm: FakeSlurm, said: str, nodes: int | None) -> None:
    """A number, or the honest answer that it is not known."""
    fake_slurm.say("sinfo", said)
    assert nodes_there("main") == nodes


def test_a_request_reads_back_what_it_wrote() -> None:
    """The stored request is the very request; another version's is refused, not guessed."""
    request = make_request(setup=("module load x",), extra={"comment": "a"})
    assert request_from_json(request_to_json(request)) == request
    assert stored_request({"request": request_to_json(request)}) == request
    assert stored_request({"request": {"cluster": "slurm"}}) is None
    assert stored_request({}) is None
