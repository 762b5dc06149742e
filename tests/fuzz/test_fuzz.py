"""Fuzzing: whatever is written in a recipe, a data file, Slurm's answers or a run folder, there is an answer in words.

Never a traceback, never a submission. `scripts/test --fuzz [N]` divides N cases (10,000) among these tests and prints
how many ran and how long it took; tests/unit/test_fuzz.py runs a few of each.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.cli import main
from launcher.errors import LauncherError, RecipeError
from launcher.facts import slurm_text
from launcher.facts.formats import read_examples
from launcher.facts.rows import read_rows
from launcher.recipe.build import field_paths
from launcher.recipe.load import recipe_from_text
from launcher.recipe.schema import DataSource
from launcher.runs import kept, slurm, story, view
from launcher.runs.adoption import open_submission
from launcher.runs.diagnosis import diagnose
from launcher.runs.folder import RunFolder
from launcher.runs.redaction import redact
from launcher.runs.remains import slurm_lines
from launcher.runs.request import JobRequest
from launcher.runs.sbatch import plain_script, submitit_script
from launcher.runs.state import judge, read_evidence
from tests.tiny import make_chat_rows, make_model_dir
from tests.unit.recipe.material import GOOD
from tests.unit.runs.material import make_request, make_run

CASES = int(os.environ.get("LAUNCHER_FUZZ_CASES", "70"))
TARGETS = 8
ran: dict[str, int] = {}
budget = settings(
    max_examples=max(1, -(-CASES // TARGETS)),
    deadline=None,
    derandomize="LAUNCHER_FUZZ_CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)

HOSTILE = st.text(st.sampled_from("\\'\"`$();&|<>#%{}[]!*:,-=\n\r\t\0\x1b\x85\u2028\u202e\ud800 aZ09.~"), max_size=24)
TEXT = HOSTILE | st.text(max_size=24)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(SCALAR, lambda x: st.lists(x, max_size=4) | st.dictionaries(TEXT, x, max_size=4), max_leaves=12)
EVENTS = [
    "submitting",
    "submitted",
    "not_submitted",
    "started",
    "joined",
    "checked",
    "resumed",
    "saving",
    "saved",
    "save_failed",
    "stopped",
    "failed",
    "died",
    "hung",
    "ended",
    "decided",
    "cancelled",
    "requeued",
    "adopted",
    "reshaped",
    "fenced",
]
KEYS = [
    "event",
    "attempt",
    "job_id",
    "token",
    "time_s",
    "host",
    "rank",
    "step",
    "error",
    "reason",
    "exit_code",
    "exit_codes",
    "signal",
    "action",
    "why",
    "cause",
    "next",
    "hosts",
    "world_size",
    "phase",
    "cluster",
    "process",
    "checkpoint",
    "seconds",
    "message",
    "type",
    "traceback",
    "stop_signal",
    "culprit",
]


@pytest.fixture(scope="module", autouse=True)
def count() -> Iterator[None]:
    """Cases and seconds, for whoever ran this."""
    began_s = time.monotonic()
    yield
    seconds = time.monotonic() - began_s
    said = f"fuzzed {sum(ran.values())} cases in {seconds:.0f} s: {json.dumps(ran)}"
    print(f"\n{said}")
    report = os.environ.get("LAUNCHER_FUZZ_REPORT")  # of several processes, each its own
    if report:
        (Path(report) / f"fuzz-{os.getpid()}.txt").write_text(said + "\n")


def case(name: str, work: Callable[[], Any]) -> Any:
    """One case: an answer, or an error in our own words."""
    ran[name] = ran.get(name, 0) + 1
    try:
        return work()
    except LauncherError as error:
        assert str(error).strip()
        return None


@budget
@given(st.lists(st.tuples(st.sampled_from(["", "  ", "- "]), TEXT, st.sampled_from([": ", ":", "", " - "]), TEXT)))
def test_recipes(lines: list[tuple[str, ...]]) -> None:
    """Alone and after a valid beginning."""
    text = "\n".join("".join(parts) for parts in lines)
    case("recipes", lambda: recipe_from_text(text, "r.yaml", []))
    case("recipes", lambda: recipe_from_text(GOOD + text, "r.yaml", []))


@budget
@given(
    st.lists(st.tuples(st.sampled_from(field_paths()), TEXT | st.from_regex(r"[\[{\"'0-9a-z.,:}\]]{0,12}")), max_size=3)
)
def test_overrides(pairs: list[tuple[str, str]]) -> None:
    """Any value for any field."""
    case("overrides", lambda: recipe_from_text(GOOD, "r.yaml", [f"{key}={value}" for key, value in pairs]))


ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", ""]) | TEXT
TURN = st.fixed_dictionaries({}, optional={"role": ROLES, "content": TEXT | JSON, "from": ROLES, "value": TEXT})
ROW = st.dictionaries(st.sampled_from(["messages", "conversations", "prompt", "completion", "text", "instruction",
                                       "output", "tools"]), st.lists(TURN, max_size=3) | JSON, max_size=3)  # fmt: skip


@budget
@given(
    st.lists(ROW | JSON, max_size=4),
    st.binary(max_size=20),
    st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz"]),
)
def test_data_rows(rows: list[Any], tail: bytes, suffix: str) -> None:
    """Rows that are almost right, and bytes that are not text, in every format of files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes("\n".join(json.dumps(row) for row in rows).encode("utf-8", "surrogatepass") + b"\n" + tail)
        source = DataSource(path=str(path))
        case("data rows", lambda: list(read_examples(source, read_rows(source))))


FIELD = st.sampled_from(
    ["JobId", "JobState", "Reason", "Restarts", "EndTime", "NodeList", "BatchHost", "TRES", "State"]
)
PAIRS = st.lists(st.tuples(FIELD | TEXT, TEXT | st.sampled_from(["RUNNING", "Unknown", "n[1-999999999]", "(null)"])))
LINES = st.lists(TEXT | st.sampled_from(["42|RUNNING", "42|RUNNING|n1|N/A|None", "x|42|PENDING||N/A|Priority"])).map(
    "|".join
)


@budget
@given(PAIRS.map(lambda pairs: " ".join(f"{key}={value}" for key, value in pairs)), LINES)
def test_slurms_answers(shown: str, line: str) -> None:
    """Of scontrol, squeue, sacct and sacctmgr; job names and comments hold what their owners like."""

    def read() -> None:
        view.parse_job(shown)
        slurm._parse_squeue(line)
        slurm._parse_sacct(line)
        list(slurm_text.records(shown, "JobId"))
        list(slurm_text.rows(line, ("a", "b", "c")))
        slurm_text.settings(shown)
        for parse in (slurm_text.whole, slurm_text.minutes, slurm_text.seconds, slurm_text.names, slurm_text.word,
                      slurm_text.flag, slurm_text.tres, slurm_text.gpus):  # fmt: skip
            parse(line)

    case("Slurm's answers", read)


@budget
@given(
    JSON | st.dictionaries(st.sampled_from(["files", "step", "run_id", "world_size", "bytes"]), JSON),
    st.binary(max_size=30),
)
def test_checkpoint_manifests(manifest: Any, raw: bytes) -> None:
    """A manifest of anything is a damaged checkpoint, never an error while looking."""
    from launcher.worker.manifest import compare, read_manifest, sizes_differ, strangers

    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        for step, data in ((1, json.dumps(manifest).encode("utf-8", "replace")), (2, raw)):
            path = run.checkpoint(step)
            path.mkdir(parents=True)
            (path / "manifest.json").write_bytes(data)

        def read() -> None:
            kept.kept_checkpoints(run)
            kept.newest_whole(run)
            for path in (run.checkpoint(1), run.checkpoint(2)):
                files = read_manifest(path).get("files", {})
                sizes_differ(path)
                strangers(path, files)
                for name, facts in files.items():
                    if isinstance(facts, dict) and facts.keys() >= {"bytes", "sha256"}:
                        compare(path / "x" / name.replace("\0", ""), facts)

        case("manifests", read)


EVENT = st.builds(
    lambda name, facts: facts | {"event": name},
    st.sampled_from(EVENTS) | TEXT,
    st.dictionaries(st.sampled_from(KEYS), JSON | st.sampled_from(["42", "42.0", "42.1", 0, 1]), max_size=8),
)


@budget
@given(st.lists(EVENT | JSON, max_size=6), JSON, JSON, TEXT)
def test_ledgers_and_records(events: list[Any], job: Any, heartbeat: Any, log: str) -> None:
    """A run folder full of nonsense is still a run with a state and a diagnosis."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        run.attempts.write_bytes(b"".join(_line(event) for event in events))
        run.job.write_bytes(_line(job))
        run.heartbeat.write_bytes(_line(heartbeat))
        run.log("42", 0).write_bytes(log.encode("utf-8", "replace"))
        for event in events:
            _report(run, event)

        def read() -> None:
            evidence = read_evidence(run)
            judge(evidence, None)
            diagnose(evidence)
            diagnose(evidence, attempt="42.0", exit_code=1)
            story.trouble(evidence.events)
            story.decision(evidence.events)
            open_submission(evidence.events)
            slurm_lines(run, "42", "42.0")
            redact(log)

        case("ledgers", read)


def _line(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "replace") + b"\n"


def _report(run: RunFolder, event: Any) -> None:
    path = run.error("42.0", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_line(event))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with a model and data, where `sbatch` leaves a mark when it is called."""
    folder = tmp_path_factory.mktemp("project")
    make_model_dir(folder / "model")
    make_chat_rows(folder / "a.jsonl")
    for name in ("sbatch", "srun", "scontrol", "sinfo", "squeue", "sacct", "sacctmgr"):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        mark = f"touch {folder}/submitted" if name == "sbatch" else ":"
        program.write_text(f"#!/bin/sh\n{mark}\nexit 1\n")
        program.chmod(0o755)
    before = Path.cwd(), os.environ["PATH"]
    os.chdir(folder)
    os.environ["PATH"] = f"{folder}/bin:{before[1]}"
    yield folder
    os.chdir(before[0])
    os.environ["PATH"] = before[1]


BROKEN = st.sampled_from(["method", "train.max_steps", "lora.r", "slurm.nodes", "slurm.time", "name", "data.train"])


@budget
@given(BROKEN, TEXT.filter(lambda text: not text.strip().isalnum()), st.lists(TEXT, max_size=2))
def test_submissions(project: Path, key: str, value: str, words: list[str]) -> None:
    """`launcher submit` with nonsense on its command line: an exit code and words, no traceback, no call of sbatch."""
    (project / "r.yaml").write_text(GOOD.replace("some/model", "model"))
    arguments = ["submit", "r.yaml", f"{key}={value}", *words]

    def submit() -> None:
        answer = CliRunner().invoke(main, arguments)
        assert answer.exit_code != 1 and isinstance(answer.exception, SystemExit | None), (arguments, answer.output)
        assert not (project / "submitted").exists(), arguments

    case("submissions", submit)


REQUEST_FIELDS = ("name", "partition", "account", "qos", "constraint", "mem", "gpu_type", "chdir", "run_dir")


@budget
@given(
    st.dictionaries(st.sampled_from(REQUEST_FIELDS), TEXT, max_size=3),
    st.dictionaries(TEXT | st.sampled_from(["comment", "mail_user", "reservation"]), TEXT | st.booleans(), max_size=2),
    st.dictionaries(TEXT | st.sampled_from(["OMP_NUM_THREADS"]), TEXT, max_size=2),
)
def test_requests(fields: dict[str, str], extra: dict[str, Any], env: dict[str, str]) -> None:
    """What is not refused stands in the script with as many lines as before."""
    request: JobRequest = make_request(**fields, extra=extra, env=env)

    def render() -> None:
        if request.problems():
            raise RecipeError("refused")
        for script in (plain_script(request), submitit_script(request)):
            for line in script.split("\n"):
                assert line.isprintable()

    case("requests", render)
