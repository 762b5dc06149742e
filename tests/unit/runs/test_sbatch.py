"""What the scripts hold: the lines that carry a job, and nothing that anybody else wrote."""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.facts.site import Container
from launcher.runs.request import JobRequest
from launcher.runs.sbatch import lines_after, lines_before, plain_script, submitit_script
from tests.unit.runs.material import make_request

HOSTILE = st.text(alphabet=st.sampled_from("\\'\"`$();&|<>#%\n\r\t\0\x0b\x0c\x85\u2028\u2029 aZ0-=,"), max_size=12)


def sbatch_lines(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


def srun_words(script: str) -> list[str]:
    return shlex.split(next(line for line in script.splitlines() if line.startswith("srun ")))


def test_one_task_per_gpu_and_all_gpus_visible() -> None:
    """Tasks per node equal GPUs per node, and GPUs are asked per node, never per task."""
    lines = sbatch_lines(submitit_script(make_request()))
    assert "#SBATCH --ntasks-per-node=2" in lines
    assert "#SBATCH --gpus-per-node=a100:2" in lines
    assert not [line for line in lines if "per-task" in line and "cpus" not in line]


def test_a_dead_rank_ends_the_job_and_logs_are_appended() -> None:
    """The srun line kills the peers of a dead rank, appends to logs and repeats the CPUs per task."""
    words = srun_words(submitit_script(make_request()))
    assert {"--kill-on-bad-exit=1", "--open-mode=append", "--cpus-per-task=4"} <= set(words)
    last_output = len(words) - 1 - words[::-1].index("--output")
    assert words[last_output + 1] == "/shared/runs/tiny-abcde/logs/%j_%t.out"


def test_no_wckey_is_sent() -> None:
    """A site that tracks wckeys refuses submitit's own."""
    assert "wckey" not in submitit_script(make_request())


def test_the_signal_comes_before_the_limit() -> None:
    """USR2 reaches the ranks ahead of the time limit, whatever submitit would have set."""
    assert "#SBATCH --signal=USR2@120" in sbatch_lines(submitit_script(make_request()))


@pytest.mark.parametrize(("requeue", "line"), [(True, "#SBATCH --requeue"), (False, "#SBATCH --no-requeue")])
def test_requeue_is_always_said(requeue: bool, line: str) -> None:
    """The cluster's default does not decide."""
    assert line in sbatch_lines(submitit_script(make_request(requeue=requeue)))


def test_a_range_of_nodes_is_asked_for_where_the_run_can_do_with_fewer() -> None:
    """Slurm gives as many as are free; ranks start on the most that divide the global batch."""
    request = make_request(nodes=4, node_counts=(1, 2))
    for script in (submitit_script(request), plain_script(request)):
        lines = sbatch_lines(script)
        assert {"#SBATCH --nodes=1-4", "#SBATCH --mincpus=8", "#SBATCH --cpus-per-task=4"} <= set(lines)
        assert not [line for line in lines if "ntasks" in line]
        choosing = [line for line in script.splitlines() if line.startswith(("for nodes", "export SLURM_"))]
        for free, used in ((4, 4), (3, 2), (2, 2), (1, 1)):
            shell = "\n".join(
                [f"SLURM_JOB_NUM_NODES={free}", *choosing, "echo $SLURM_NNODES $SLURM_NTASKS $SLURM_NTASKS_PER_NODE"]
            )
            said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
            assert said.split() == [str(used), str(2 * used), "2"]


def test_both_scripts_ask_for_the_same_job() -> None:
    """The script for plain sbatch has the #SBATCH lines of the one that is submitted."""
    request = make_request(extra={"mail_type": "END", "overcommit": True}, exclusive=True, mem="10G")
    assert sorted(sbatch_lines(plain_script(request))) == sorted(sbatch_lines(submitit_script(request)))


@pytest.mark.parametrize("render", [plain_script, submitit_script])
def test_the_last_words_get_sruns_status_and_give_the_jobs(render: Callable[[JobRequest], str]) -> None:
    """After srun comes the aftermath, with srun's own status, and nothing that could turn failure into success."""
    lines = [line for line in render(make_request()).splitlines() if line and not line.startswith("#")]
    at = next(n for n, line in enumerate(lines) if line.startswith("srun "))
    assert lines[at + 1 :] == [
        "rc=$?",
        'kill "$watch" 2>/dev/null',
        "/usr/bin/python3 -u -m launcher.runs.aftermath /shared/runs/tiny-abcde $rc",
        "exit $?",
    ]


@pytest.mark.parametrize("render", [plain_script, submitit_script])
def test_a_signal_does_not_end_the_script_before_its_last_words(
    render: Callable[[JobRequest], str], tmp_path: Path
) -> None:
    """The lines around srun, run by bash with fake programs, while the script itself gets USR2 and TERM."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/said\n[ "${{!#}}" = before ] && exit 0; exit "${{!#}}"\n')
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/bash\ntouch {tmp_path}/runs; for i in $(seq 300); do [ -e {tmp_path}/go ] && exit 17; "
                    "sleep 0.1; done\n")  # fmt: skip
    for fake in (program, srun):
        fake.chmod(0o755)
    script = tmp_path / "script.sh"
    lines = render(make_request(tmp_path, python=str(program), chdir="/")).splitlines()
    script.write_text("\n".join(lines) + "\n")
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(["bash", str(script)], env=environ, text=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < deadline, "srun was never called"
        time.sleep(0.02)
    for number in (signal.SIGUSR2, signal.SIGTERM):
        process.send_signal(number)
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 17
    assert "launcher: attempt 7.0" in out
    said = [line for line in (tmp_path / "said").read_text().splitlines() if "lost_srun" not in line]
    assert said == [f"-u -m launcher.runs.aftermath {tmp_path} {word}" for word in ("before", "17")]


@pytest.mark.parametrize("render", [plain_script, submitit_script])
def test_ranks_start_with_the_run_folder_as_their_only_argument(render: Callable[[JobRequest], str]) -> None:
    """submitit's own entry would unpickle a file of the submission folder."""
    words = srun_words(render(make_request()))
    assert words[-5:] == ["/usr/bin/python3", "-u", "-m", "launcher.runs.train_job", "/shared/runs/tiny-abcde"]


def test_both_scripts_have_the_same_lines_around_srun() -> None:
    """One run behaves the same whichever way it was submitted."""
    request = make_request()
    for lines in (lines_before(request), lines_after(request)):
        text = "\n".join(lines)
        assert text in plain_script(request)
        assert text in submitit_script(request)


def test_site_environment_is_quoted() -> None:
    """Values of the site profile reach the job unchanged, whatever a shell would make of them."""
    value = "a b'c\"$HOME`id`"
    line = next(ln for ln in plain_script(make_request(env={"K": value})).splitlines() if ln.startswith("export K="))
    assert shlex.split(line) == ["export", f"K={value}"]


def test_pyxis_container_is_an_srun_matter() -> None:
    """Pyxis takes image and mounts as options of srun."""
    container = Container(
        runtime="pyxis", image="nvcr.io#nvidia/pytorch:25.01", mounts=("/shared:/shared", "/scratch:/x")
    )
    words = srun_words(submitit_script(make_request(container=container)))
    assert "--container-image=nvcr.io#nvidia/pytorch:25.01" in words
    assert "--container-mounts=/shared:/shared,/scratch:/x" in words


def test_apptainer_container_is_a_prefix_of_python() -> None:
    """Apptainer runs Python inside the image, with the GPUs where there are any."""
    container = Container(runtime="apptainer", image="/images/train.sif", mounts=("/shared:/shared",))
    words = srun_words(plain_script(make_request(container=container, python="python3")))
    at = words.index("apptainer")
    assert words[at : at + 7] == [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        "/shared:/shared",
        "/images/train.sif",
        "python3",
    ]
    assert "--nv" not in srun_words(plain_script(make_request(container=container, gpus_per_node=None)))


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "mem", "name", "run_dir", "gpu_type"])
@given(value=HOSTILE)
@example(value="\\'\"\ntouch canary #")
@example(value="a\x85#SBATCH --wrap=id")
@example(value="a\u2028b")
@settings(max_examples=60, deadline=None)
def test_no_field_can_add_a_line(field: str, value: str) -> None:
    """Either the request is refused, or the scripts have exactly the lines of a harmless request."""
    request = make_request(**{field: value})
    if request.problems():
        return
    assert_same_shape(request, make_request(**{field: "harmless"}))


@given(key=st.one_of(HOSTILE, st.sampled_from(["nodelist", "comment", "wrap", "output"])), value=HOSTILE)
@example(key="comment", value="\\'\"\nid")
@example(key="comment=x\n#SBATCH --wrap", value="id")
@settings(max_examples=200, deadline=None)
def test_no_extra_option_can_add_a_line(key: str, value: str) -> None:
    """`slurm.extra` adds one #SBATCH line of its own, or is refused."""
    request = make_request(extra={key: value})
    if request.problems():
        return
    assert_same_shape(request, make_request(extra={"comment": "harmless"}))


def assert_same_shape(request: object, harmless: object) -> None:
    for render in (submitit_script, plain_script):
        ours, theirs = render(request), render(harmless)  # type: ignore[arg-type]
        assert len(ours.splitlines()) == len(theirs.splitlines())
        kinds = [[line.split("=")[0].split(" ")[0] for line in text.splitlines()] for text in (ours, theirs)]
        assert kinds[0] == kinds[1]
        # Slurm's parser honours a backslash inside single quotes: none may be there at all.
        assert not any("\\" in line for line in sbatch_lines(ours))


@pytest.mark.parametrize(
    "letter", ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "'", '"', "\\", "`", "$"]
)
def test_dangerous_characters_are_named(letter: str) -> None:
    """The message says which character of which field is refused."""
    problems = make_request(partition=f"a{letter}b").problems()
    assert any("slurm.partition" in one and f"U+{ord(letter):04X}" in one for one in problems)


def test_a_warning_that_would_come_too_early_is_refused() -> None:
    """Slurm may send the signal a minute early; a lead of half the limit would leave no time to train."""
    problems = make_request(time_min=3, signal_lead_s=100).problems()
    assert problems == [
        "slurm.time: 3 min is too short to be warned 100 s before its end (the time one step and a checkpoint take); "
        "at least 4 min is needed"
    ]
