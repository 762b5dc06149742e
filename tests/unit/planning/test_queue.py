"""Asking Slurm when a job would start: bounded, never a submission, and silent where nobody answers."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from launcher.cli import main
from launcher.facts.model import model_shape
from launcher.planning.plan import JobShape, plan_from_json, plan_to_json
from launcher.planning.queue import MOST_CALLS, NoQueue, SlurmQueue, queue_of
from launcher.planning.search import make_plan
from launcher.recipe.schema import BudgetSection, SlurmSection
from launcher.report.text import print_plan
from tests.unit.planning.examples import A100, DATA, LLAMA_8B, a_recipe, plan_of

NOW = datetime(2026, 3, 1, 12, 0, 0)
JOB = JobShape(time_limit_min=60, cpus_per_task=8, mem="100G")


class FakeSbatch:
    """An sbatch in a folder for the PATH: notes its arguments and says when a job of so many nodes would start."""

    def __init__(self, folder: Path) -> None:
        self.calls_file = folder / "calls.jsonl"
        self.answers = folder / "answers.json"
        program = folder / "sbatch"
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, sys\n"
            f"open({str(self.calls_file)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
            "nodes = next(word[8:] for word in sys.argv if word.startswith('--nodes='))\n"
            f"status, words = json.load(open({str(self.answers)!r})).get(nodes, [1, 'sbatch: error: no'])\n"
            "sys.stderr.write(words + '\\n')\n"
            "sys.exit(status)\n"
        )
        program.chmod(0o755)
        self.answers.write_text("{}")

    def starts(self, **minutes: float | str) -> None:
        """`n2=90`: two nodes would start in 90 minutes; a text is what sbatch complains of instead."""
        said = {}
        for key, value in minutes.items():
            if isinstance(value, str):
                said[key[1:]] = [1, value]
            else:
                start = (NOW + timedelta(minutes=value)).isoformat()
                said[key[1:]] = [
                    0,
                    f"sbatch: Job 7 to start at {start} using 8 processors on nodes n1 in partition main",
                ]
        self.answers.write_text(json.dumps(said))

    @property
    def calls(self) -> list[list[str]]:
        return (
            [json.loads(line) for line in self.calls_file.read_text().splitlines()] if self.calls_file.exists() else []
        )


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSbatch:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return FakeSbatch(tmp_path)


def planned(recipe, queue):
    return make_plan(recipe, model_shape(recipe.model), DATA, A100, queue=queue)


def asking(recipe, **options):
    return SlurmQueue(recipe, A100, now=lambda: NOW, **options)


WIDE = a_recipe(LLAMA_8B, "lora", budget=BudgetSection(max_gpu_hours=20), slurm=SlurmSection(gpus_per_node=8))


def test_a_start_is_read_from_what_sbatch_prints(sbatch):
    """Seconds from now; a time that has passed means at once."""
    sbatch.starts(n1=90, n2=-5)
    candidate = plan_of(WIDE).chosen.candidate
    queue = asking(WIDE)
    assert queue.start_s(replace(candidate, nodes=1), JOB) == 90 * 60
    assert queue.start_s(replace(candidate, nodes=2), JOB) == 0


def test_what_is_asked_is_a_test_of_the_jobs_shape(sbatch):
    """--test-only always stands there, no text of the recipe is run, and one shape is asked once."""
    sbatch.starts(n2=1)
    recipe = replace(WIDE, slurm=SlurmSection(partition="main", qos="fast", exclusive=True, extra={"reservation": "r"}))
    queue = SlurmQueue(recipe, replace(A100, gpu_type="a100", account="us"), now=lambda: NOW)
    candidate = replace(plan_of(WIDE).chosen.candidate, nodes=2, gpus_per_node=8)
    assert queue.start_s(candidate, JOB) == queue.start_s(candidate, JOB) == 60
    (call,) = sbatch.calls
    assert call[0] == "--test-only"
    assert {"--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=8", "--time=60", "--gpus-per-node=a100:8"} <= set(call)
    assert {"--partition=main", "--account=us", "--qos=fast", "--mem=100G", "--reservation=r", "--exclusive"} <= set(
        call
    )
    assert call[-1] == "--wrap=true"


def test_calls_are_bounded(sbatch):
    """A controller counts every call; beyond the bound nothing is asked and nothing is claimed."""
    sbatch.starts(**{f"n{nodes}": 1 for nodes in range(1, 20)})
    queue, candidate = asking(WIDE), plan_of(WIDE).chosen.candidate
    answers = [queue.start_s(replace(candidate, nodes=nodes), JOB) for nodes in range(1, 20)]
    assert answers == [60.0] * MOST_CALLS + [None] * (19 - MOST_CALLS)
    assert len(sbatch.calls) == MOST_CALLS


def test_a_refusal_of_one_shape_is_no_answer_for_it(sbatch):
    """Slurm's no to sixteen nodes leaves the others."""
    sbatch.starts(n1=5, n16="sbatch: error: Batch job submission failed: Requested node configuration is not available")
    queue, candidate = asking(WIDE), plan_of(WIDE).chosen.candidate
    assert queue.start_s(replace(candidate, nodes=16), JOB) is None
    assert queue.start_s(replace(candidate, nodes=1), JOB) == 300


def test_the_earliest_result_counts_the_wait(sbatch):
    """Sixteen nodes tomorrow lose against one now; sixteen now win. The plan says when it would start."""
    sbatch.starts(n1=0, n2=24 * 60, n4=24 * 60, n8=24 * 60, n16=24 * 60)
    busy = planned(WIDE, asking(WIDE))
    assert busy.chosen.candidate.nodes == 1
    assert busy.chosen.start_s == 0
    assert busy.chosen.result_s == busy.chosen.wall_s
    sbatch.starts(n1=0, n2=0, n4=0, n8=0, n16=0)
    idle = planned(WIDE, asking(WIDE))
    assert idle.chosen.candidate.nodes > 1
    assert any(advice.source == "sbatch --test-only" for advice in idle.advice)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(busy)))) == busy


def test_alternatives_are_ranked_by_when_their_result_is_there(sbatch):
    """Those that fit stand in the order of wait plus run."""
    sbatch.starts(n1=0, n2=600, n4=300, n8=900, n16=1200)
    told = [each for each in planned(WIDE, asking(WIDE)).alternatives if each.fits]
    assert [each.result_s for each in told] == sorted(each.result_s for each in told)
    assert any(each.start_s for each in told)


def test_the_table_of_alternatives_shows_waits_and_ways_out(sbatch):
    """When each would start, why a rejected one is rejected, and what would make it fit."""
    sbatch.starts(n1=0, n2=90, n4=90, n8=90, n16=90)
    plan = planned(replace(WIDE, method="full"), asking(WIDE))
    out = io.StringIO()
    print_plan(plan, all_alternatives=True, console=Console(file=out, width=300, highlight=False))
    assert "STARTS IN" in out.getvalue() and "90 min" in out.getvalue()
    assert "; fits with " in out.getvalue()


def test_without_an_answer_run_times_decide(sbatch):
    """An sbatch that knows nothing changes nothing."""
    assert planned(WIDE, asking(WIDE)) == plan_of(WIDE)


def test_a_hanging_controller_is_asked_once(sbatch, monkeypatch):
    """After the first time-out the plan goes on without it."""

    def hang(*_args, **options):
        raise subprocess.TimeoutExpired("sbatch", options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    queue, candidate = asking(WIDE), plan_of(WIDE).chosen.candidate
    assert queue.start_s(candidate, JOB) is None
    monkeypatch.undo()
    assert queue.start_s(replace(candidate, nodes=16), JOB) is None


@pytest.mark.parametrize(("wanted", "kind"), [(False, NoQueue), (True, SlurmQueue), (None, NoQueue)])
def test_who_is_asked(sbatch, wanted, kind):
    """Never when told not to; unasked only the Slurm the site was probed from, never another cluster's."""
    assert isinstance(queue_of(WIDE, A100, wanted=wanted), kind)
    assert isinstance(queue_of(WIDE, replace(A100, executor="local"), wanted=True), NoQueue)
    probed = replace(A100, source={"gpu": "asked of Slurm"})
    assert isinstance(queue_of(WIDE, probed), SlurmQueue)


def test_nobody_is_asked_where_there_is_no_sbatch(tmp_path, monkeypatch):
    """A laptop plans the same."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isinstance(queue_of(WIDE, A100, wanted=True), NoQueue)


@pytest.mark.parametrize(("flag", "calls"), [("--no-queue", 0), ("--queue", 1), (None, 0)])
def test_the_command_asks_when_told_to(sbatch, flag, calls):
    """A profile of another cluster is not this Slurm's: it is asked only on request, and `--no-queue` never."""
    sbatch.starts(n8=3)
    arguments = ["plan", "llama3.1-70b-full", "--json", *([flag] if flag else [])]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert len([call for call in sbatch.calls if "--nodes=8" in call]) == calls
    assert (json.loads(done.stdout)["chosen"]["start_s"] is not None) == bool(calls)


@pytest.mark.parametrize("objective", ["time", "cost", "quality"])
def test_the_command_takes_an_objective(objective, monkeypatch, tmp_path):
    """What is chosen is what `make_plan` chooses for it."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodel: {name_or_path: meta-llama/Llama-3.1-8B}\nslurm: {site: a100-80gb}\n"
        "data: {train: [{path: HuggingFaceH4/ultrachat_200k, split: train_sft}]}\n"
    )
    done = CliRunner().invoke(main, ["plan", str(recipe), "--json", "--objective", objective], catch_exceptions=False)
    chosen = json.loads(done.stdout)["chosen"]
    assert chosen["method"] == ("full" if objective == "quality" else "lora")
    cheapest = min(each["gpu_hours"] for each in json.loads(done.stdout)["alternatives"] if each["fits"])
    assert objective != "cost" or chosen["gpu_hours"] <= 1.03 * cheapest
