"""The probe job: what a node answers, and what becomes of a job that is refused, silent or dead."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ClusterError, TemporaryError
from launcher.facts.offer import FileSystem
from launcher.facts.survey import Survey
from launcher.runs import site_probe, site_probe_job
from tests.unit.runs.material import FakeSlurm

ANSWER: dict[str, Any] = {
    "schema": 1,
    "scontrol": True,
    "reached": {"api.wandb.ai": False, "huggingface.co": True},
    "gpus": ["NVIDIA A100-SXM4-40GB"],
    "containers": ["apptainer"],
    "seen": {"runs": True, "home": False},
    "local": [
        {"path": "/local_scratch", "type": "xfs", "free_bytes": 10**12, "memory": False, "fast": True},
        {"path": "$TMPDIR", "type": "tmpfs", "free_bytes": 10**9, "memory": True, "fast": False},
    ],
}


class Teapot(BaseHTTPRequestHandler):
    """Answers everything with an error, which is an answer."""

    def do_HEAD(self) -> None:
        self.send_response(418)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def found() -> Survey:
    """A site with GPUs whose login node has been surveyed."""
    survey = Survey(cluster="iron")
    survey.note("default_partition", "gpu", "test")
    survey.note("gpu_type", "a100", "test")
    survey.note("request_gpus", True, "test")
    survey.note("gpu", "A100-80GB", "a guess")
    survey.note("containers", ("enroot",), "test")
    places = (FileSystem(name="runs", path="runs", shared=True), FileSystem(name="home", path="$HOME", shared=True))
    survey.note("file_systems", places, "test")
    return survey


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for a job's answer is a second, and Slurm is asked at once."""
    monkeypatch.setenv("LAUNCHER_PROBE_WAIT_S", "1")
    monkeypatch.setattr(site_probe_job, "_ASK_SLURM_EVERY_S", 0.1)


def test_any_answer_counts_as_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An HTTP error comes from the other side; a closed port, a name that is none and no address do not."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Teapot)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        urls = {
            "there": f"http://127.0.0.1:{server.server_port}",
            "closed": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "odd": "nonsense",
        }
        assert site_probe.reach(urls, timeout_s=5) == {"there": True, "closed": False, "odd": False}
    server.shutdown()


def test_a_node_answers_with_a_file(tmp_path: Path, no_slurm: Path) -> None:
    """Without Slurm, GPUs, network or packages: every question has an answer."""
    mark = tmp_path / "mark"
    mark.touch()
    request = {"urls": {}, "marks": {"runs": str(mark), "home": str(tmp_path / "nowhere")}}
    (tmp_path / site_probe.REQUEST).write_text(json.dumps(request))
    assert site_probe.main(tmp_path) == 0
    answer = json.loads((tmp_path / site_probe.ANSWER).read_text())
    assert set(answer) == set(ANSWER)
    assert (answer["scontrol"], answer["gpus"], answer["seen"]) == (False, [], {"runs": True, "home": False})


def test_a_nodes_own_disk_is_named_by_its_variable(tmp_path: Path) -> None:
    """A folder of this one job must not stand in a profile; its variable may."""
    shown = site_probe.disks({"SLURM_TMPDIR": str(tmp_path), "TMPDIR": "/nonexistent"})
    assert str(tmp_path) not in json.dumps(shown)
    assert all(one["free_bytes"] > 0 and not (one["fast"] and one["path"].startswith("$")) for one in shown)


def test_what_the_node_says_wins(found: Survey) -> None:
    """The driver knows the GPU better than a GRES type, and a node what it sees."""
    site_probe_job.add_answer(found, ANSWER)
    values = found.values
    assert (values["gpu"], values["scontrol_on_nodes"], values["internet_on_nodes"]) == ("A100-40GB", True, True)
    assert values["containers"] == ("enroot", "apptainer")
    assert [(one.name, one.shared) for one in values["file_systems"]] == [
        *(("runs", True), ("home", False), ("node", False), ("node", False))
    ]
    assert values["nvme_path"] == "/local_scratch"
    assert "huggingface.co yes" in found.sources["internet_on_nodes"]


def test_the_job_asks_for_little_and_carries_no_secret(
    found: Survey, fake_slurm: FakeSlurm, tmp_path: Path, patience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task, one GPU, two minutes; of the environment only what finding Python needs."""
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    monkeypatch.setenv("https_proxy", "http://user:canary@proxy")
    fake_slurm.say("sbatch", "4711;iron\n")
    with pytest.raises(TemporaryError, match="4711 did not answer within 1 s"):
        site_probe_job.ask_node(found, tmp_path / "runs", say=print)
    words = fake_slurm.calls("sbatch")[0]
    assert {"--ntasks=1", "--gpus-per-node=a100:1", "--time=2", "--partition=gpu", "--no-requeue"} <= set(words)
    exported = next(word for word in words if word.startswith("--export=")).removeprefix("--export=").split(",")
    assert "PATH" in exported
    assert not {"ALL", "WANDB_API_KEY", "https_proxy"} & set(exported)
    assert "canary" not in fake_slurm.script
    assert fake_slurm.calls("scancel") == [["4711"]]
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_a_dead_job_is_told_with_its_last_words(
    found: Survey, fake_slurm: FakeSlurm, tmp_path: Path, patience: None
) -> None:
    """The job ended and left no answer: its state and its log say why."""
    fake_slurm.say("sbatch", "4711\n")
    fake_slurm.say("squeue", "4711|FAILED|node1|N/A|NonZeroExitCode\n")
    with pytest.raises(
        ClusterError, match="4711 ended as FAILED without an answer: it wrote no log; the nodes may not"
    ):
        site_probe_job.ask_node(found, tmp_path / "runs", say=print)


def test_a_refused_job_quotes_slurm(found: Survey, fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    """Slurm's own words, exit 5, and no folder left."""
    fake_slurm.say("sbatch", stderr="sbatch: error: invalid partition specified: gpu", status=1)
    with pytest.raises(ClusterError, match="invalid partition specified"):
        site_probe_job.ask_node(found, tmp_path / "runs", say=print)
    assert not (tmp_path / "runs").exists()
