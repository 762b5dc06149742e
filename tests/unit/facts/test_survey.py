"""What `launcher init` learns from each version of Slurm, without accounting, and from hostile answers."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from launcher.errors import ClusterError, TemporaryError
from launcher.facts import probe, survey
from launcher.facts.offer import Partition, Site
from launcher.facts.profile import read_profile
from launcher.facts.site import site_facts
from launcher.facts.slurm_text import tres
from launcher.report.site import profile_text
from tests.unit.facts.slurm_site import VERSIONS, FakeSite, recorded


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with bash and cat only, a login with nothing set, and a user called auser."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("bash", "cat"):
        (folder / name).symlink_to(str(shutil.which(name)))
    for name in ("LAUNCHER_RUNS", "LAUNCHER_SITE", "LAUNCHER_VENV", "SCRATCH", "WORK", "LMOD_CMD", "MODULESHOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(tmp_path)
    for module in (probe, survey):
        monkeypatch.setattr(module, "user_name", lambda: "auser")
    return folder


def ask(site: FakeSite, tools: Path, monkeypatch: pytest.MonkeyPatch, **wanted: str) -> survey.Survey:
    """Survey the fake site from a login node."""
    site.write()
    monkeypatch.setenv("PATH", f"{site.folder}:{tools}")
    return survey.survey(runs=Path("runs"), environ={"HOME": str(site.folder)}, **wanted)


def saved(found: survey.Survey, folder: Path) -> Site:
    """The site as a recipe finds it when the profile has been written."""
    path = folder / "here.yaml"
    text = profile_text(found, "here", "2026-11-22")
    path.write_text(text)
    assert set(read_profile(path)) == {"name", *found.values}, text
    return site_facts(str(path))


def partition(site: Site, name: str) -> Partition:
    return next(one for one in site.partitions if one.name == name)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_profile_reads_back_as_what_was_found(
    version: str, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the version: every value survives the file (free space in whole GiB), and every entry has a source."""
    found = ask(recorded(version, tmp_path / "slurm"), tools, monkeypatch)
    site = saved(found, tmp_path)
    for key, value in found.values.items():
        if key != "file_systems":
            assert getattr(site, key) == value, key
    assert site.slurm_version is not None and site.slurm_version.startswith(version)
    assert set(found.sources) == set(found.values)


def test_the_development_cluster(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """22.05: preemption by QOS with a signal, eight GPUs per node, a QOS that may preempt two others."""
    site = saved(ask(recorded("22.05", tmp_path / "slurm"), tools, monkeypatch), tmp_path)
    assert (site.default_partition, site.gpu_type, site.gpus_per_node, site.max_nodes) == ("main", "a100", 8, 4)
    assert (site.preempt_type, site.preempt_mode, site.preempt_signal) == ("preempt/qos", "REQUEUE", True)
    assert (site.enforce_part_limits, site.requeue_by_default, site.max_array_size) == ("NO", True, 10001)
    assert site.accounting_enforce == ("associations", "limits", "qos")
    assert (partition(site, "low").preempt_grace_s, partition(site, "high").preempt_mode) == (5, "OFF")
    assert {one.name: one.preempts for one in site.qos_limits}["urgent"] == ("normal", "preemptible")
    assert site.account_limits[0].account == "dev"


def test_limits_and_restrictions_of_an_old_slurm(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20.11: unix groups, an account list that repeats itself, limits of QOS and account, nodes of several sizes."""
    site = saved(ask(recorded("20.11", tmp_path / "slurm"), tools, monkeypatch), tmp_path)
    gpu, batch = partition(site, "gpu"), partition(site, "batch")
    assert (gpu.allow_accounts, gpu.qos, gpu.max_cpus_per_node) == (("proj1", "proj2"), "gpu-partition", 48)
    assert (gpu.gpus_per_node, gpu.mem_bytes_per_node) == (4, 760_000 * 2**20)
    assert (batch.gpus_per_node, batch.allow_groups, batch.default_time_min) == (0, ("physics", "wheel"), 60)
    assert batch.max_mem_bytes_per_node == 3200 * 2**20
    limits = {one.name: one for one in site.qos_limits}["gpu-partition"]
    assert (limits.max_time_min, limits.max_submit_jobs) == (24 * 60, 10)
    assert tres(limits.max_tres_per_user) == {"cpu": 640, "gres/gpu": 32}
    mine = {one.account: one for one in site.account_limits}["proj1"]
    assert (mine.max_time_min, mine.max_jobs, mine.max_submit_jobs) == (7 * 24 * 60, 4, 20)
    assert (site.enforce_part_limits, site.requeue_by_default) == ("ALL", False)
    assert (site.preempt_type, site.kill_wait_s) == ("none", 30)


def test_what_newer_versions_write_differently(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24.05: deny lists, records of several lines, names with spaces, MIG slices, the preemption signal's new place."""
    site = saved(ask(recorded("24.05", tmp_path / "slurm"), tools, monkeypatch), tmp_path)
    assert (site.default_partition, site.gpu, site.gpus_per_node) == ("h100", "H100-80GB", 4)
    assert partition(site, "h100").deny_qos == ("class", "summer_2026")
    assert partition(site, "h100").preempt_grace_s == 120
    cpu = partition(site, "CPU nodes (amd)")
    assert (cpu.up, cpu.deny_accounts, cpu.cpus_per_node) == (False, ("guests",), 2)
    assert partition(site, "slices").gpu_types == ("nvidia_a100_3g.20gb",)
    assert (site.preempt_signal, site.preempt_mode, site.enforce_part_limits) == (True, "GANG,REQUEUE", "ANY")
    assert tres(site.account_limits[0].group_tres)["gres/gpu"] == 64, "a limit of the whole account"
    assert (site.account_limits[0].group_jobs, site.account_limits[0].group_submit_jobs) == (16, 100)
    assert all(one.flags == ("DenyOnLimit",) for one in site.qos_limits)
    assert [one.name for one in site.qos_limits] == ["debug", "preempt", "regular"], "spare is not granted"


def test_nodes_that_start_no_job_are_counted_out(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draining, invalid and silent nodes are not up; powered-down and planned ones are. A profile never says it."""
    found = ask(recorded("24.05", tmp_path / "slurm"), tools, monkeypatch)
    assert {one.name: one.nodes_up for one in probe.partitions()} == {"h100": 30, "CPU nodes (amd)": 2, "slices": 1}
    assert "nodes_up" not in profile_text(found, "here", "2026-11-22")


@pytest.mark.parametrize(
    ("state", "starts", "silent"),
    [
        ("idle", True, False),
        ("idle*", False, True),
        ("unk*", False, True),
        ("down*", False, False),
        ("idle~", True, False),
    ],
)
def test_nodes_that_have_not_answered_yet_are_not_lost(state: str, starts: bool, silent: bool) -> None:
    """After a restart of the controller every node is silent for a moment: nothing to refuse a job for."""
    up, quiet = _counted(f"main|16|64000|gpu:8|4|{state}|(null)")
    assert (up, quiet) == (4 * starts, 4 * silent)


def _counted(listing: str) -> tuple[int, int]:
    nodes = probe._nodes_of_partitions(listing)["main"]
    return nodes["nodes_up"], nodes["nodes_silent"]


def test_a_site_without_accounting(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """25.11 with (null) plugins: no limits, no failure; what is not known is said, with the way to find out."""
    found = ask(recorded("25.11", tmp_path / "slurm"), tools, monkeypatch)
    site = saved(found, tmp_path)
    assert (site.accounting, site.accounting_enforce, site.preempt_type) == (False, (), "none")
    assert (site.gpu, site.request_gpus, partition(site, "gpu").nodes) == ("cpu", False, 0)
    assert "no accounting" in found.unknown["qos_limits"]
    assert "--probe-job" in found.unknown["internet_on_nodes"]


def test_no_right_to_ask_accounting(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sacctmgr refuses: the profile is written all the same, and an account asked for is taken at its word."""
    slurm = recorded("22.05", tmp_path / "slurm")
    del slurm.answers["qos"], slurm.answers["associations"]
    slurm.refusal = "error: Access/permission denied"
    found = ask(slurm, tools, monkeypatch, account="dev")
    assert (found.values["accounting"], found.values["account"]) == (True, "dev")
    assert "not checked" in found.sources["account"]
    assert {"qos_limits", "account_limits"} <= set(found.unknown)


def test_no_right_to_see_the_configuration(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sites hide slurm.conf: partitions are enough for a profile, and the rest is named as not known."""
    slurm = recorded("22.05", tmp_path / "slurm")
    del slurm.answers["config"]
    slurm.refusal = "error: Access/permission denied"
    found = ask(slurm, tools, monkeypatch)
    assert found.values["default_partition"] == "main"
    assert {"slurm_version", "enforce_part_limits", "requeue_by_default", "max_array_size"} <= set(found.unknown)
    saved(found, tmp_path)


def test_nothing_of_a_person_gets_into_the_file(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account named after the user, a list with it and the home folder: none of these may be sent to a colleague."""
    slurm = recorded("22.05", tmp_path / "slurm")
    slurm.answers["associations"] = "||||||||normal||auser|normal|def-auser\n"
    slurm.answers["partition"] = slurm.answers["partition"].replace("AllowAccounts=ALL", "AllowAccounts=auser,dev")
    found = ask(slurm, tools, monkeypatch)
    text = profile_text(found, "here", "2026-11-22")
    assert "auser" not in text
    assert str(tmp_path) not in text
    assert "allow_accounts: [someone, dev]" in text


def test_gpus_without_a_type_are_left_to_a_person(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpu:8` does not say what it is: no guess is written, and the file says how to find out."""
    slurm = recorded("22.05", tmp_path / "slurm")
    slurm.answers["sinfo"] = slurm.answers["sinfo"].replace("gpu:a100:8", "gpu:8")
    found = ask(slurm, tools, monkeypatch)
    assert "gpu" not in found.values
    assert "# gpu: Slurm names GPUs without a type; launcher init --probe-job" in profile_text(found, "x", "2026-11-22")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [({"partition": "mian"}, "did you mean main?"), ({"account": "dve"}, "did you mean dev?")],
)
def test_a_misspelt_name_is_refused(
    wanted: dict[str, str], says: str, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-p and -A name what exists."""
    with pytest.raises(ClusterError, match="did you mean") as caught:
        ask(recorded("22.05", tmp_path / "slurm"), tools, monkeypatch, **wanted)
    assert says in str(caught.value)


def test_without_slurm_there_is_nothing_to_survey(tools: Path) -> None:
    """On a laptop: try again on a login node (exit 75)."""
    with pytest.raises(TemporaryError, match="login node"):
        survey.survey(runs=Path("runs"))


def test_hostile_answers_stay_text(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes, YAML, control characters and absurd numbers in names and lists: the profile still reads back the same."""
    slurm = recorded("22.05", tmp_path / "slurm")
    odd = "a|b: {c}, [d] # 'e' \"f\" - &g *h !i %j"
    slurm.answers["partition"] = (
        f"PartitionName={odd} Default=YES AllowAccounts=x:y,#z,'q MaxTime=99999999999999-00:00:00 State=UP "
        f"Nodes=n[1-999999999] TotalNodes=999999999 MaxNodes={'9' * 5000} GraceTime=99:99\n"
        "PartitionName=bell\x07 State=UP TotalNodes=1\nPartitionName=null State=UP TotalNodes=1 QoS=true\nnonsense\n"
    )
    slurm.answers["sinfo"] = f"{odd}|64|256000|gpu:h100:8,gpu:x:{'9' * 5000}|999999999|idle|ib,#x\n|||\nbroken\n\n"
    slurm.answers["associations"] = "||||||||normal||auser|normal|pipe|in|account\nshort|row\n"
    slurm.answers["qos"] = f"{'9' * 5000}||||cpu=,=,mem=x,gres/gpu=4=4||||cluster|x|,,||normal\n"
    began = time.monotonic()
    site = saved(ask(slurm, tools, monkeypatch), tmp_path)
    assert time.monotonic() - began < 20, "a host list of a billion nodes was expanded"
    assert (site.default_partition, site.max_nodes, site.gpus_per_node) == (odd, 999_999_999, 8)
    assert partition(site, odd).allow_accounts == ("x:y", "#z", "'q")
    assert [one.name for one in site.partitions] == [odd, "null"], "an unprintable name is left out"
    assert site.account_limits[0].account == "pipe|in|account"
    assert (site.qos_limits[0].max_time_min, site.qos_limits[0].max_tres_per_user) == (None, None)


WORDS = [
    *(
        "PartitionName=",
        "NodeName=",
        "\n",
        "|",
        "||||||||",
        " ",
        "=",
        ",",
        ":",
        "#",
        "- ",
        "\x00",
        "\x1b[31m",
        "\u2028",
        "é",
    ),
    *(
        " State=UP",
        " MaxTime=1:00",
        " AllowAccounts=",
        " QoS=",
        " GraceTime=",
        "gpu:a100:8",
        "cpu=4,mem=9G",
        "null",
        "1-0",
    ),
    *("ClusterName = x\n", "PreemptType = ", "KillWait = 30 sec\n", "AccountingStorageType = a/slurmdbd\n", "9" * 40),
]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=25).map("".join), min_size=5, max_size=5)
)
def test_any_answer_makes_a_profile_that_reads_back(answers: list[str]) -> None:
    """Or is refused because it shows no partition; never a traceback, never a file that the next plan cannot read."""
    spoken = dict(zip(("config", "partition", "sinfo", "associations", "qos"), answers, strict=True))

    def slurm(command: list[str], **_: float) -> str:
        return spoken.get("sinfo" if command[0] == "sinfo" else command[command.index("show") + 1], "")

    def absent(command: list[str], **_: float) -> str:
        raise TemporaryError(f"{command[0]} is not here")

    spoken["partition"] = f"PartitionName={spoken['partition']}"
    here = (patch.object(probe, "run_slurm", slurm), patch.object(survey, "run_slurm", slurm))
    with TemporaryDirectory() as folder, here[0], here[1], patch.object(survey, "run_command", absent):
        try:
            found = survey.survey(runs=Path(folder), environ={})
        except ClusterError as error:
            assert "no partition" in str(error)
            event("refused")
            return
        path = Path(folder) / "x.yaml"
        path.write_text(profile_text(found, "x", "2026-11-22"), encoding="utf-8")
        assert set(read_profile(path)) == {"name", *found.values}


def test_endless_lists_are_cut_and_the_file_says_so(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand partitions with hundreds of accounts each would be more than a profile may hold."""
    slurm = recorded("22.05", tmp_path / "slurm")
    accounts = ",".join(f"acct{number}" for number in range(300))
    slurm.answers["partition"] = "".join(
        f"PartitionName=p{number:04} AllowAccounts={accounts} State=UP TotalNodes=1\n" for number in range(1000)
    )
    slurm.answers["sinfo"] = "".join(f"p{number:04}|8|1000|(null)|1|idle|(null)\n" for number in range(1000))
    found = ask(slurm, tools, monkeypatch)
    assert len(saved(found, tmp_path).partitions) == 150
    assert any("850 more" in how for how in found.unknown.values())
