"""`launcher init` on the real cluster: what it writes is true, loads, and is used by the next plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.facts.profile import read_profile
from tests.cluster.bed import JOB_USER, Bed


def test_a_login_node_is_enough(bed: Bed) -> None:
    """No job is submitted; partitions, preemption, QOS and limits are what the cluster was set up with."""
    before = bed.queue()
    bed.launcher("init", "--site", "surveyed").expect()
    profile = bed.home / "slurm" / "surveyed.yaml"
    values = read_profile(profile)
    assert [one.name for one in values["partitions"]] == ["high", "low", "main"]
    assert (values["gpus_per_node"], values["gpu_type"], values["max_nodes"]) == (8, "a100", 4)
    assert (values["preempt_type"], values["preempt_mode"]) == ("preempt/qos", "REQUEUE")
    assert {one.name for one in values["qos_limits"]} == {"normal", "preemptible", "urgent"}
    assert [one.account for one in values["account_limits"]] == ["dev"]
    assert "scontrol_on_nodes" not in values
    text = profile.read_text()
    assert JOB_USER not in text and str(bed.home) not in text
    assert bed.queue() == before
    plan = json.loads(bed.launcher("plan", bed.recipe("by-profile"), "slurm.site=surveyed", "--json").expect().out)
    assert plan["chosen"]["nodes"] == 1
    again = bed.launcher("init", "--site", "surveyed").expect(7)
    assert "slurm/surveyed-2.yaml" in again.err
    assert profile.read_text() == text


def test_a_node_is_asked_by_a_job(bed: Bed) -> None:
    """One small job: it sees the runs folder, can ask the controller, and leaves nothing behind."""
    answer = bed.launcher("init", "--site", "probed", "--probe-job", "--json").expect()
    document = json.loads(answer.out)
    values = document["values"]
    assert values["scontrol_on_nodes"] is True
    assert isinstance(values["internet_on_nodes"], bool)
    assert {one["name"]: one["shared"] for one in values["file_systems"]}["runs"] is True
    assert "probe job" in document["sources"]["internet_on_nodes"]
    assert set(read_profile(bed.home / "slurm" / "probed.yaml")) == {"name", *values}
    assert not list((bed.home / "runs").glob(".site-probe-*"))
    assert not list(bed.home.glob(".launcher-probe-*"))


@pytest.mark.parametrize("words", [("-p", "mian"), ("-A", "nobody")])
def test_what_does_not_exist_is_refused(bed: Bed, words: tuple[str, str]) -> None:
    """Exit 5 with the names there are; no file."""
    bed.launcher("init", "--site", "refused", *words).expect(5)
    assert not Path(bed.home / "slurm" / "refused.yaml").exists()
