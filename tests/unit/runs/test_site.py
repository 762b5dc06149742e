"""Which site a recipe means, and what a profile may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import ClusterError
from launcher.facts.profile import read_profile
from launcher.facts.site import profile_path, site_facts
from launcher.recipe.shipped import shipped_folder
from tests.unit.runs.material import FakeSlurm

SCONTROL = (
    "PartitionName=cpu AllowAccounts=ALL AllowQos=ALL Default=YES MaxTime=UNLIMITED MaxNodes=UNLIMITED State=UP"
    " TotalNodes=9\n"
    "PartitionName=gpu AllowAccounts=proj1,proj2 AllowQos=ALL Default=NO MaxTime=2-00:00:00 MaxNodes=8 State=UP"
    " TotalNodes=24\n"
)
SINFO = "cpu|64|256000|(null)\ngpu|96|1000000|gpu:h100:8(S:0-1)\ngpu|64+|512000+|gpu:h100:4\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder to work in, with no settings of the user."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return folder


def profile(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def test_auto_without_slurm_is_this_machine(no_slurm: Path, project: Path) -> None:
    """No Slurm, no profile: ranks run here, on the CPU where there is no GPU."""
    site = site_facts("auto")
    assert (site.executor, site.gpu, site.max_nodes, site.request_gpus) == ("local", "cpu", 1, False)
    assert site.cpus_per_node >= 1 and site.mem_bytes_per_node > 2**28
    assert site.source["mem_bytes_per_node"] == "this machine"


def test_auto_asks_a_slurm_that_answers(fake_slurm: FakeSlurm, project: Path) -> None:
    """Partitions, limits and GPUs come from Slurm; a partition with GPUs is preferred."""
    fake_slurm.say("sinfo", SINFO)
    fake_slurm.say("scontrol", SCONTROL)
    site = site_facts(None)
    assert (site.executor, site.default_partition, site.gpu, site.gpu_type) == ("slurm", "gpu", "H100-80GB", "h100")
    assert (site.gpus_per_node, site.max_nodes, site.cpus_per_node, site.max_time_min) == (8, 8, 96, 2 * 24 * 60)
    assert site.mem_bytes_per_node == 1_000_000 * 2**20
    assert [partition.name for partition in site.partitions] == ["cpu", "gpu"]
    assert site.partitions[1].allow_accounts == ("proj1", "proj2")


def test_auto_prefers_the_profile_of_the_cluster(fake_slurm: FakeSlurm, project: Path) -> None:
    """A profile named like the cluster is used without being asked for, whatever the spelling."""
    profile(project / "slurm", "big-iron", "executor: slurm\ngpu: H100-80GB\ngpus_per_node: 4\nmax_nodes: 2\n"
            "cpus_per_node: 8\nmem_bytes_per_node: 10G\n")  # fmt: skip
    fake_slurm.say("sinfo", SINFO)
    fake_slurm.say("scontrol", "ClusterName             = BigIron\n")
    assert (site_facts("auto").name, site_facts("auto").gpus_per_node) == ("big-iron", 4)


def test_environment_names_the_site(no_slurm: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$LAUNCHER_SITE decides before anything is probed; LAUNCHER_VENV names the jobs' Python."""
    monkeypatch.setenv("LAUNCHER_SITE", "dev-cluster")
    monkeypatch.setenv("LAUNCHER_VENV", "/opt/jobs")
    site = site_facts("auto")
    assert (site.name, site.executor, site.venv) == ("dev-cluster", "slurm", "/opt/jobs")


def test_own_profiles_come_before_shipped_ones(no_slurm: Path, project: Path, tmp_path: Path) -> None:
    """./slurm wins over the user's folder, which wins over what is shipped."""
    assert profile_path("local").parent == shipped_folder("slurm")
    users = profile(tmp_path / "config" / "launcher" / "sites", "local", "executor: local\n")
    assert profile_path("local") == users
    profile(project / "slurm", "local", "executor: local\n")
    assert profile_path("local") == Path("slurm/local.yaml")


@pytest.mark.parametrize("path", sorted(shipped_folder("slurm").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_profile_loads(path: Path, no_slurm: Path) -> None:
    """What is shipped is complete, or is completed by probing this machine."""
    assert site_facts(str(path)).name == path.stem


def test_unknown_site_lists_the_known_ones(no_slurm: Path, project: Path) -> None:
    """A misspelt name is answered with the nearest one and all others."""
    with pytest.raises(ClusterError) as caught:
        site_facts("dev-clutser")
    assert "did you mean dev-cluster?" in str(caught.value)
    assert {"dev-cluster", "local"} <= set(str(caught.value).split("known: ")[1].split(", "))


def test_values_are_read_by_their_field(tmp_path: Path) -> None:
    """Times and sizes are written as people write them; YAML's own reading of 24:00:00 does not matter."""
    text = "max_time_min: 24:00:00\nmem_bytes_per_node: 500G\nrequest_gpus: no\nintra_node_bw_bytes_s: 3e11\n"
    values = read_profile(profile(tmp_path, "x", text + "env: {OMP_NUM_THREADS: 08}\n"))
    assert values["max_time_min"] == 24 * 60
    assert values["mem_bytes_per_node"] == 500 * 2**30
    assert values["request_gpus"] is False
    assert values["intra_node_bw_bytes_s"] == 3e11
    assert values["env"] == {"OMP_NUM_THREADS": "08"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus_per_nod: 8", "x.yaml:1:1: unknown key 'gpus_per_nod'; did you mean gpus_per_node?"),
        ("executor: pbs", "x.yaml:1:11: executor is 'pbs'; expected slurm or local"),
        ("max_nodes: many", "x.yaml:1:12: max_nodes is 'many'; expected a whole number"),
        ("max_nodes: 0", "x.yaml:1:12: max_nodes is '0'; expected more than 0"),
        ("mem_bytes_per_node: lots", "x.yaml:1:21: mem_bytes_per_node is 'lots'; expected a size such as 64G or 2T"),
        ("setup: module load x", "x.yaml:1:8: setup is a list"),
        ('setup: ["a\\nb"]', "x.yaml:1:9: setup holds a control character; write one line per list entry"),
        ("container: {runtime: docker}", "x.yaml:1:22: runtime is 'docker'; expected none or pyxis or apptainer"),
        ("partitions: [{nodes: 3}]", "x.yaml:1:14: a partition needs a name"),
        ("name: a\nname: b", "x.yaml:2:1: key 'name' stands twice; first at line 1, keep one"),
    ],
)
def test_wrong_profiles_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    """Every mistake in a profile names file, line and column."""
    with pytest.raises(ClusterError) as caught:
        read_profile(profile(tmp_path, "x", text + "\n"))
    assert message in str(caught.value).replace(f"{tmp_path}/", "")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """One reading of the error is enough to mend the file."""
    with pytest.raises(ClusterError) as caught:
        read_profile(profile(tmp_path, "x", "gpuz: 1\nexecutor: pbs\nmax_nodes: many\n"))
    assert len(caught.value.problems) == 3


def test_missing_facts_that_slurm_cannot_give_are_named(no_slurm: Path, tmp_path: Path) -> None:
    """A profile that leaves things to a Slurm that is not there says which."""
    path = profile(tmp_path, "x", "executor: slurm\ngpu: cpu\n")
    with pytest.raises(Exception, match="leaves out gpus_per_node, max_nodes, cpus_per_node, mem_bytes_per_node"):
        site_facts(str(path))
