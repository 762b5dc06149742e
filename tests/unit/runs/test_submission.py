"""From a plan to a job: what is written, what is sent, and what is left when Slurm says no."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import ClusterError, ConflictError, RecipeError, TemporaryError
from launcher.planning.plan import plan_from_json
from launcher.recipe.load import load_recipe
from launcher.runs import lock, status
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.redaction import redact
from launcher.runs.request import JobRequest
from launcher.runs.sbatch import submitit_script
from launcher.runs.submission import create_run, describe, job_request, print_sbatch, submit
from tests.tiny import make_recipe
from tests.unit.runs.material import FakeSlurm, make_plan, make_request, make_run, make_site


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs")


def request_for(run: RunFolder, **overrides: object) -> JobRequest:
    return make_request(run.path, name=run.run_id, chdir=str(run.path), **overrides)


# ---------------------------------------------------------------- the run folder


def test_a_run_folder_repeats_the_run(tmp_path: Path, no_slurm: Path) -> None:
    """Recipe as written, recipe as resolved, plan and DeepSpeed configuration can all be read back."""
    recipe = make_recipe(tmp_path)
    plan = make_plan(zero_stage=2)
    run = create_run("name: tiny  # as written\n", recipe, plan, make_site(), tmp_path / "runs")
    assert run.recipe.read_text() == "name: tiny  # as written\n"
    assert load_recipe(run.resolved) == recipe
    assert plan_from_json(json.loads(run.plan.read_text())) == plan
    assert json.loads(run.ds_config.read_text())["zero_optimization"]["stage"] == 2
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_plain_torch_needs_no_deepspeed_configuration(tmp_path: Path, no_slurm: Path) -> None:
    """Stage 0 does not run DeepSpeed, so no configuration lies there to mislead."""
    run = create_run("", make_recipe(tmp_path), make_plan(), make_site(), tmp_path / "runs")
    assert not run.ds_config.exists()


def test_the_environment_is_recorded_without_secrets(
    tmp_path: Path, no_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commit and versions are there; values of secret variables and token-shaped words are not."""
    monkeypatch.setenv("WANDB_API_KEY", "canary-5f3a9c1e")
    run = create_run("", make_recipe(tmp_path), make_plan(), make_site(), tmp_path / "runs")
    text = run.environment.read_text()
    facts = json.loads(text)
    assert facts["packages"]["submitit"] and facts["python"]
    assert "canary-5f3a9c1e" not in text
    token = "hf_" + "a1B2" * 8
    assert redact(f"+key = '{token}' canary-5f3a9c1e https://me:pass@host/x") == (
        "+key = '[redacted]' [redacted] https://[redacted]@host/x"
    )


# ---------------------------------------------------------------- the request


def test_the_request_takes_the_plan_and_the_site(tmp_path: Path, no_slurm: Path, run: RunFolder) -> None:
    """Shape from the plan, names from the recipe before those of the site."""
    recipe = make_recipe(tmp_path, slurm={"qos": "urgent"})
    site = make_site(account="proj1", qos="normal", modules=("cuda/12.4",), env={"NCCL_DEBUG": "WARN"}, venv="/opt/v")
    request = job_request(make_plan(nodes=2, gpus_per_node=4, cpus_per_task=3, mem="20G"), recipe, run, site)
    assert (request.nodes, request.tasks_per_node, request.gpus_per_node, request.gpu_type) == (2, 4, 4, "a100")
    assert (request.cpus_per_task, request.mem, request.time_min) == (3, "20G", 60)
    assert (request.partition, request.account, request.qos) == ("main", "proj1", "urgent")
    assert request.setup == ("module load cuda/12.4 || exit 1",)
    assert request.env["NCCL_DEBUG"] == "WARN" and request.env["OMP_NUM_THREADS"] == "3"
    assert request.python == "/opt/v/bin/python"


def test_cpu_sites_ask_for_gpus_only_where_told(tmp_path: Path, no_slurm: Path, run: RunFolder) -> None:
    """A site without GPUs to ask for gets no --gpus-per-node, however many ranks run."""
    request = job_request(make_plan(gpus_per_node=2), make_recipe(tmp_path), run, make_site(request_gpus=False))
    assert (request.tasks_per_node, request.gpus_per_node) == (2, None)


def test_a_local_job_has_no_limits(tmp_path: Path, no_slurm: Path, run: RunFolder) -> None:
    """On this machine nothing is queued: no time limit, no partition, and threads shared among the ranks."""
    site = make_site(executor="local", cpus_per_node=2, max_nodes=1)
    request = job_request(make_plan(gpus_per_node=2, cpus_per_task=8), make_recipe(tmp_path), run, site)
    assert (request.cluster, request.time_min, request.partition) == ("local", None, None)
    assert (request.gpus_per_node, request.env["OMP_NUM_THREADS"]) == (None, "1")


def test_one_machine_is_one_node(tmp_path: Path, no_slurm: Path, run: RunFolder) -> None:
    """A plan for several nodes cannot run here, and says what to change."""
    with pytest.raises(ClusterError, match=r"slurm\.nodes=1"):
        job_request(make_plan(nodes=2), make_recipe(tmp_path), run, make_site(executor="local"))


def test_the_lead_covers_a_step_and_a_checkpoint(tmp_path: Path, no_slurm: Path, run: RunFolder) -> None:
    """A limit too short to save in is refused with the one that would do."""
    recipe = make_recipe(tmp_path)
    assert job_request(make_plan(time_limit_min=600), recipe, run, make_site()).signal_lead_s == 120
    assert job_request(make_plan(time_limit_min=4), recipe, run, make_site()).signal_lead_s == 60
    assert job_request(make_plan(time_limit_min=1), recipe, run, make_site()).signal_lead_s < 30


def test_hostile_recipe_values_never_reach_a_request(tmp_path: Path, no_slurm: Path, run: RunFolder) -> None:
    """Exit 2 before anything is written for sbatch."""
    recipe = make_recipe(tmp_path, slurm={"account": "a\\'\"\nid"})
    with pytest.raises(RecipeError) as caught:
        job_request(make_plan(), recipe, run, make_site())
    assert len(caught.value.problems) == 4  # backslash, both quotes, line end


def test_dry_run_prints_what_is_sent(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """The described script is, byte for byte, what sbatch receives."""
    fake_slurm.say("sbatch", "Submitted batch job 42\n")
    request = request_for(run, account="proj1", extra={"comment": "a b"}, env={"K": "v w"})
    described = describe(request)
    submit(request)
    assert fake_slurm.script == described["script"]


def test_a_request_is_described_where_there_is_no_slurm(run: RunFolder, no_slurm: Path) -> None:
    """`--dry-run` works on a laptop."""
    described = describe(request_for(run))
    assert "#SBATCH --nodes=2" in described["script"]
    assert json.loads(json.dumps(described))["nodes"] == 2


# ---------------------------------------------------------------- submitting


def test_submit_leaves_the_job_in_the_run_folder(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """job.json holds the request and its id, the ledger its first event; nothing is pickled."""
    fake_slurm.say("sbatch", "Submitted batch job 42\n")
    assert submit(request_for(run)) == "42"
    job = json.loads(run.job.read_text())
    assert (job["job_id"], job["request"]["nodes"]) == ("42", 2)
    assert [event["event"] for event in read_json_lines(run.attempts)] == ["submitting", "submitted"]
    assert not list(run.path.rglob("*.pkl"))


def test_variables_of_a_surrounding_job_are_hidden(
    run: RunFolder, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitting from inside a job must not inherit its CPUs, tasks or ranks; SLURM_CONF stays."""
    for name in (
        "SLURM_JOB_ID",
        "SLURM_CPU_BIND",
        "SBATCH_TIMELIMIT",
        "SRUN_DEBUG",
        "PMIX_RANK",
        "MASTER_PORT",
        "RANK",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    monkeypatch.setenv("KEPT", "yes")
    fake_slurm.say("sbatch", "Submitted batch job 42\n")
    submit(request_for(run))
    foreign = [name for name in fake_slurm.environment if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMIX_"))]
    assert foreign == ["SLURM_CONF"]
    assert not {"RANK", "MASTER_PORT"} & set(fake_slurm.environment)
    assert fake_slurm.environment["KEPT"] == "yes"


def test_without_sbatch_another_machine_is_named(run: RunFolder, no_slurm: Path) -> None:
    """Exit 5 (waiting helps nobody), a hint where to go, and no folder left behind."""
    with pytest.raises(ClusterError, match=r"sbatch is not on this machine's PATH.*login node"):
        submit(request_for(run))
    assert not run.path.exists()


@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: fatal: Could not establish a configuration source",
    ],
)
def test_an_unreachable_controller_is_try_again_later(run: RunFolder, fake_slurm: FakeSlurm, words: str) -> None:
    """Exit 75 with Slurm's words, and no folder left behind."""
    fake_slurm.say("sbatch", stderr=words + "\n", status=1)
    with pytest.raises(TemporaryError) as caught:
        submit(request_for(run))
    assert words in str(caught.value)
    assert not run.path.exists()


def test_a_refusal_quotes_slurm_and_lists_what_exists(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Exit 5 with Slurm's words, what was asked and the partitions there are; nothing stays."""
    fake_slurm.say("sbatch", stderr="sbatch: error: invalid partition specified: main\n", status=1)
    fake_slurm.say("scontrol", "PartitionName=gpu State=UP TotalNodes=4\nPartitionName=long State=UP TotalNodes=4\n")
    fake_slurm.say("sinfo", "gpu|8|1000|gpu:2\nlong|8|1000|gpu:2\n")
    with pytest.raises(ClusterError) as caught:
        submit(request_for(run))
    assert "invalid partition specified: main" in str(caught.value)
    assert "partitions here: gpu, long" in str(caught.value)
    assert not run.path.exists()


def test_a_refused_restart_keeps_the_run(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A folder in which something has run is never removed."""
    run.record("started", job_id="41")
    fake_slurm.say("sbatch", stderr="sbatch: error: Invalid qos specification\n", status=1)
    with pytest.raises(ClusterError):
        submit(request_for(run))
    assert run.recipe.exists()


def test_the_script_for_plain_sbatch_is_remembered(run: RunFolder, no_slurm: Path) -> None:
    """`--print-sbatch` submits nothing; once its job runs by hand, the run is followed by the ledger's job id."""
    script = print_sbatch(request_for(run))
    assert script.startswith("#!/bin/bash\n#SBATCH")
    assert status.run_status(run).state == "NOT_SUBMITTED"
    run.record("started", job_id="77", attempt="0")
    assert status.run_status(run).job_id == "77"


def test_a_local_site_has_no_script(run: RunFolder) -> None:
    """There is no sbatch to print for."""
    with pytest.raises(ClusterError, match="no Slurm"):
        print_sbatch(request_for(run, cluster="local"))


def test_rendering_needs_no_executor(run: RunFolder) -> None:
    """submitit's private renderer still takes what we give it."""
    assert submitit_script(request_for(run)).startswith("#!/bin/bash")


# ---------------------------------------------------------------- answers that get lost


def loses_the_reply(fake: FakeSlurm, words: str = "") -> None:
    """An sbatch that hands the job to Slurm and then fails: from now on squeue knows a job of the run's name."""
    script = f"""#!/bin/bash
echo call >> '{fake.folder}/sbatch.calls'
name=$(sed -n 's/^#SBATCH --job-name=//p' "${{@: -1}}")
printf '%s|42|PENDING||N/A|Priority\\n' "$name" > '{fake.folder}/squeue.out'
echo '{words}' >&2
exit 1
"""
    path = fake.folder / "sbatch"
    path.write_text(script)
    path.chmod(0o755)


@pytest.mark.parametrize(
    "words", ["", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"]
)
def test_a_lost_reply_is_no_second_job(run: RunFolder, fake_slurm: FakeSlurm, words: str) -> None:
    """The job that Slurm has is found by its name and taken over; sbatch is called once."""
    loses_the_reply(fake_slurm, words)
    said: list[str] = []
    assert submit(request_for(run), say=said.append) == "42"
    assert (fake_slurm.folder / "sbatch.calls").read_text().count("call") == 1
    assert json.loads(run.job.read_text())["job_id"] == "42"
    assert any("job 42 of this run is there" in sentence for sentence in said)


def test_a_job_of_an_earlier_submission_is_not_mistaken_for_the_lost_one(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """All jobs of a run share its name; those in the ledger are old ones."""
    run.record("submitted", job_id="41")
    run.record("started", job_id="41", attempt="0")
    fake_slurm.say("squeue", f"{run.run_id}|41|FAILED|node1|N/A|NonZeroExitCode\n")
    fake_slurm.say("sbatch", stderr="sbatch: error: Invalid qos specification\n", status=1)
    with pytest.raises(ClusterError, match="Invalid qos"):
        submit(request_for(run))
    assert [event["event"] for event in read_json_lines(run.attempts)][-1] == "not_submitted"


def test_when_nobody_knows_nothing_more_is_sent(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A reply lost together with the controller: the folder stays, its open line lets the job be found later."""
    fake_slurm.say("sbatch", stderr="sbatch: error: Socket timed out on send/recv operation\n", status=1)
    fake_slurm.say("squeue", stderr="Unable to contact slurm controller (connect failure)", status=1)
    with pytest.raises(TemporaryError, match="launcher status " + run.run_id):
        submit(request_for(run))
    assert [event["event"] for event in read_json_lines(run.attempts)] == ["submitting"]
    fake_slurm.say("squeue", f"{run.run_id}|42|RUNNING|node1|N/A|None\n")
    assert status.run_status(run).job_id == "42"
    fake_slurm.say("squeue", "42|RUNNING|node1|N/A|None\n")
    found = status.run_status(run)
    assert (found.state, found.job_id) == ("RUNNING", "42"), "it was written down"


def test_a_controller_that_comes_back_gets_one_job(
    run: RunFolder, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is away sbatch is tried again within the bound; what it takes in the end is the only job."""
    monkeypatch.setenv("LAUNCHER_PATIENCE_S", "30")
    back = fake_slurm.folder / "back"
    script = f"""#!/bin/bash
echo call >> '{fake_slurm.folder}/sbatch.calls'
if [ -e '{back}' ]; then echo 'Submitted batch job 42'; exit 0; fi
printf '' > '{back}'
echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' >&2
exit 1
"""
    (fake_slurm.folder / "sbatch").write_text(script)
    assert submit(request_for(run)) == "42"
    assert (fake_slurm.folder / "sbatch.calls").read_text().count("call") == 2


def test_a_run_that_somebody_submits_is_left_to_them(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Two submitters would make two jobs of one run."""
    with lock.hold(run, "resume"), pytest.raises(ConflictError, match="launcher resume"):
        submit(request_for(run))
    assert fake_slurm.calls("sbatch") == [] and run.recipe.exists()
