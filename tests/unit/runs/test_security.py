"""The security checklist, row by row (s01 ... s21): what needs neither ranks nor a Slurm.

Trust: whoever wrote the recipe, the model or the data is not the user who submits; other users of the file system are
hostile; root and Slurm are trusted. Rows 4, 5, 7, 9, 16 and 17 stand in tests/train/test_security.py too, rows 9, 10,
12 and 21 in tests/cluster/test_security.py.
"""

from __future__ import annotations

import ast
import contextlib
import grp
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import launcher
from launcher.errors import ClusterError, LauncherError, RecipeError
from launcher.facts.slurm_text import names
from launcher.facts.weights import model_folder_problems
from launcher.recipe.load import recipe_from_text
from launcher.runs import redaction, variables
from launcher.runs.autopsy import write_death
from launcher.runs.folder import RunFolder, append_json_line, make_folder, write_atomic
from launcher.runs.garbage import find_garbage
from launcher.runs.kept import kept_checkpoints
from launcher.runs.lock import hold
from launcher.runs.sbatch import plain_script, submitit_script
from launcher.runs.slurm import _parse_sacct, _parse_squeue
from launcher.runs.submission import submit
from launcher.runs.train_job import main as task_main
from launcher.runs.train_job import show_logs
from tests.privileges import unavailable
from tests.tiny import make_model_dir
from tests.unit.recipe.material import GOOD
from tests.unit.runs.material import FakeSlurm, make_request, make_run

PACKAGE = Path(launcher.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
STRANGER = 65534
CANARY = "canary-5f3a9c1e7b"


def calls(*wanted: str) -> list[str]:
    """Where the package calls functions of these names, as `file:name`."""
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in wanted:
                found.append(f"{path.relative_to(PACKAGE)}:{ast.unparse(node.func)}")
    return found


def as_root() -> None:
    """Some tests give files away."""
    if os.geteuid() != 0:
        unavailable("needs root: gives files to another user")


# --- 1 to 3: shells and pickles ---------------------------------------------------------------------


@quick
@given(
    st.sampled_from(["name", "partition", "account", "qos", "constraint", "mem", "run_dir", "chdir"]),
    st.text(st.sampled_from("\\'\"`$();&|<>#%\n\r\t\0\x85\u2028 aZ0-=,"), min_size=1, max_size=12),
)
def test_s01_no_value_of_a_recipe_can_add_a_word_to_the_script(field: str, value: str) -> None:
    """It is refused, or stands in the script as itself: as one word of one line."""
    request = make_request(**{field: value})
    if request.problems():
        return
    for script in (plain_script(request), submitit_script(request)):
        others = plain_script(make_request()) if script.startswith("#!/bin/bash\n#SBATCH") else script
        assert script.count("\n") <= others.count("\n") + 60
        lines = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
        assert all(len(shlex.split(line[8:], comments=False)) == 1 for line in lines if value in line)


def test_s02_nothing_is_run_through_a_shell() -> None:
    """No call takes a shell, and submitit's raw shell parameters come from the site, never from the recipe."""
    assert calls("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec") == []
    with_shell = [
        f"{path.name}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) != "False"
    ]
    assert with_shell == []
    request = make_request(extra={"comment": CANARY}, constraint=CANARY, partition=CANARY)
    assert request.problems() == []
    carrying = [line for line in submitit_script(request).splitlines() if CANARY in line]
    assert carrying and all(line.startswith("#SBATCH ") for line in carrying)


def test_s03_the_job_unpickles_nothing(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """No pickle is written at submission, and our code never loads one."""
    run = make_run(tmp_path)
    fake_slurm.say("sbatch", "Submitted batch job 42\n")
    submit(make_request(run.path))
    assert not list(tmp_path.rglob("*.pkl"))
    assert "submitit.core" not in (fake_slurm.script or "")
    assert calls("pickle.load", "pickle.loads", "cloudpickle.load", "DelayedSubmission.load", "joblib.load") == []


@pytest.mark.parametrize("way", ["foreign", "group-writable", "link"])
def test_s03_a_task_reads_no_folder_that_others_could_have_filled(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stops before anything in the folder is looked at; nor does a submitter take it."""
    run = make_run(tmp_path)
    path = run.path
    if way == "foreign":
        as_root()
        os.chown(path, STRANGER, STRANGER)
    elif way == "group-writable":
        path.chmod(0o770)
    else:
        path = tmp_path / "link"
        path.symlink_to(run.path)
    mask = os.umask(0o022)
    try:
        assert task_main(["train_job", str(path)]) == 5
    finally:
        os.umask(mask)
    assert "nothing in it is read" in capsys.readouterr().err
    with pytest.raises(ClusterError, match="its job would run whatever others put there"), hold(RunFolder(path), "x"):
        pass


# --- 4 to 8: files of strangers ---------------------------------------------------------------------


def test_s04_torch_loads_weights_only() -> None:
    """Every torch.load of the package says so itself."""
    loads = [
        node
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert loads
    for node in loads:
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), ast.unparse(node)


def test_s06_pickled_weights_are_no_model(tmp_path: Path) -> None:
    """safetensors only."""
    folder = make_model_dir(tmp_path / "model")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert any("only pickled weights" in problem for problem in model_folder_problems(folder))


@pytest.mark.parametrize(
    "text",
    [
        "train: !!python/object/apply:os.system ['touch {canary}']",
        "name: ${oc.env:HOME}",
        "wandb: {project: '${oc.env:WANDB_API_KEY}'}",
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]",
        "x: " + "[" * 2000,
    ],
)
def test_s08_yaml_is_text_and_nothing_else(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags, resolvers and bombs are refused; no variable's value gets into a message."""
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    canary = tmp_path / "canary"
    with pytest.raises(RecipeError) as caught:
        recipe_from_text(GOOD + text.replace("{canary}", str(canary)) + "\n", "r.yaml", [])
    assert not canary.exists() and CANARY not in str(caught.value)


# --- 9 to 11: secrets -------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": f"{CANARY}-wandb",
    "HF_TOKEN": f"{CANARY}-hf",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws",
    "AWS_SESSION_TOKEN": f"{CANARY}-session",
    "DB_PASSWORD": f"{CANARY}-password",
    "LAUNCHER_SITE_PASSWORD": f"{CANARY}-site",
    "NCCL_API_KEY": f"{CANARY}-nccl",
    "https_proxy": f"http://me:{CANARY}@proxy:3128",
}


def test_s09_a_submission_shows_no_secret(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in the script, not in sbatch's arguments, not in the run folder; one private file holds what jobs need."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run = make_run(tmp_path)
    fake_slurm.say("sbatch", "Submitted batch job 42\n")
    submit(make_request(run.path, export=variables.exported_names(os.environ)))
    assert CANARY not in (fake_slurm.script or "") + str(fake_slurm.calls("sbatch")) + "".join(capsys.readouterr())
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and CANARY in path.read_text(errors="replace")]
    fakes = [path for path in holding if fake_slurm.folder in path.parents]  # the fake writes down what sbatch inherits
    assert [path for path in holding if path not in fakes] == [variables.secrets_file(run.path)]
    assert variables.read_secrets(run.path).keys() == {"WANDB_API_KEY", "HF_TOKEN", "https_proxy"}


def test_s10_slurm_is_given_names_of_harmless_variables_only() -> None:
    """The default, ALL, would keep every secret of the shell with the job."""
    environ = SECRETS | {"PATH": "/bin", "HOME": "/home/me", "NCCL_DEBUG": "INFO", "EDITOR": "vi", "SLURM_JOB_ID": "1"}
    assert variables.exported_names(environ) == ("HOME", "NCCL_DEBUG", "PATH")
    for script in (plain_script, submitit_script):
        text = script(make_request(export=("HOME", "PATH")))
        assert "#SBATCH --export=HOME,PATH" in text and "\nexport SLURM_EXPORT_ENV=ALL\n" in text
        assert "#SBATCH --export=NONE" in script(make_request())


def test_s10_secrets_travel_in_a_private_file(tmp_path: Path) -> None:
    """0600 in 0700; what is open to others, foreign or a link is neither used nor written to."""
    run = make_run(tmp_path)
    variables.leave_secrets(run.path, SECRETS | {"LAUNCHER_SECRETS": "DB_PASSWORD"})
    path = variables.secrets_file(run.path)
    assert [stat.S_IMODE(one.stat().st_mode) for one in (path.parent, path)] == [0o700, 0o600]
    assert variables.read_secrets(run.path)["DB_PASSWORD"] == SECRETS["DB_PASSWORD"]
    assert "AWS_SECRET_ACCESS_KEY" not in variables.read_secrets(run.path)
    path.chmod(0o640)
    with pytest.raises(ClusterError, match="open to others"):
        variables.read_secrets(run.path)
    path.unlink()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path.symlink_to(victim)
    with pytest.raises(ClusterError, match="symbolic link"):
        variables.leave_secrets(run.path, SECRETS)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        f"KeyError: '{CANARY}'",
        "GET https://me:swordfish@host/x failed",
        "Authorization: Bearer hf_abcdefghijklmnopqrstuvwxyz",
        "api_key='0123456789abcdef0123456789abcdef01234567'",
        "AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_s11_logs_and_records_are_redacted(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of variables that are named like secrets, and what looks like a token."""
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    cleaned = redaction.redact(text)
    assert "[redacted]" in cleaned
    assert not re.search(f"{CANARY}|swordfish|hf_abc|0123456789abcdef|AKIA", cleaned)


def test_s11_an_ordinary_log_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that only sound alike, short values, paths and commit hashes."""
    for name, value in {"KEYBOARD": "qwertyuiop", "API_KEY": "short", "SSH_KEY": "/home/me/.ssh/id"}.items():
        monkeypatch.setenv(name, value)
    text = "step 3 qwertyuiop short /home/me/.ssh/id tokens/s key=value commit 0123456789abcdef0123456789abcdef01234567"
    assert redaction.redact(text) == text


def test_s11_an_uncaught_traceback_is_redacted() -> None:
    """A rank's own output, as its process prints it."""
    code = (
        "from launcher.runs.redaction import redact_output\nredact_output()\nimport traceback, os\n"
        "try:\n    raise RuntimeError('cannot log in with ' + os.environ['WANDB_API_KEY'])\n"
        "except RuntimeError:\n    traceback.print_exc()\nprint(os.environ['WANDB_API_KEY'])"
    )
    environ = os.environ | {"WANDB_API_KEY": CANARY, "PYTHONPATH": str(PACKAGE.parent)}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert CANARY not in ran.stdout + ran.stderr
    assert "cannot log in with [redacted]" in ran.stderr and ran.stdout == "[redacted]\n"


# --- 12 to 15: files --------------------------------------------------------------------------------


def test_s12_everything_a_submission_writes_is_private(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """Folders 0700, files 0600, whatever the user's mask; the job sets its own mask first."""
    mask = os.umask(0o000)
    try:
        run = make_run(tmp_path)
        run.path.chmod(0o700)
        fake_slurm.say("sbatch", "Submitted batch job 42\n")
        submit(make_request(run.path))
    finally:
        os.umask(mask)
    written = [run.job, run.attempts, *run.submission.iterdir()]
    assert len(written) > 2
    assert [f"{one.name} {one.stat().st_mode:o}" for one in written if one.stat().st_mode & 0o077] == []
    assert "\numask 077\n" in plain_script(make_request())


def other_group() -> grp.struct_group:
    """A group that is nobody's here by default."""
    return next(one for one in grp.getgrall() if one.gr_gid not in {0, STRANGER, *os.getgroups()})


def seen_by(user: int, group: int, *words: str) -> int:
    """Exit status of a command run as another user in one group only."""
    ran = subprocess.run(words, user=user, group=group, extra_groups=[], capture_output=True, cwd="/", check=False)
    return ran.returncode


@pytest.fixture
def passable() -> Iterator[Path]:
    """A folder that everybody may pass: pytest's own are private."""
    folder = Path(tempfile.mkdtemp(prefix="launcher-group-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def test_s12_a_group_reads_a_run_that_was_given_to_it(passable: Path) -> None:
    """With `output_group` a colleague reads plan, ledger, logs and errors, and writes nothing; others read nothing.

    Checkpoints, which a reader would unpickle, the ranks' token and secrets stay the owner's alone.
    """
    as_root()
    team = other_group()
    run = RunFolder.create(passable / "runs", "shared", group=team.gr_name)
    log = run.logs / "5_0.out"
    log.write_text("step 1\n")
    log.chmod(0o600)
    write_atomic(run.plan, "{}")
    run.record("submitted", job_id="5")
    write_death(run, "5.0", {"rank": 1, "message": "broke"})
    show_logs(run.path)
    write_atomic(run.rendezvous / "token", "secret")
    make_folder(run.checkpoint(3))
    variables.leave_secrets(run.path, {"WANDB_API_KEY": CANARY})
    for path in (run.plan, run.attempts, log, run.error("5.0", 1)):
        assert seen_by(STRANGER, team.gr_gid, "cat", str(path)) == 0, path
        assert seen_by(STRANGER, STRANGER, "cat", str(path)) != 0, path
    for path in (run.rendezvous / "token", run.path.parent / ".secrets" / "environment.json"):
        assert seen_by(STRANGER, team.gr_gid, "cat", str(path)) != 0, path
    assert seen_by(STRANGER, team.gr_gid, "ls", str(run.checkpoints)) != 0
    for folder in (run.path, run.logs, run.errors, run.path.parent):
        assert seen_by(STRANGER, team.gr_gid, "touch", str(folder / "planted")) != 0, folder
    assert [str(path) for path in run.path.rglob("*") if path.stat().st_mode & 0o027] == []


def test_s12_a_setgid_project_folder_gives_nobody_a_run(tmp_path: Path) -> None:
    """Where every new folder gets the project's group, a run without `output_group` stays private all the same."""
    project = tmp_path / "project"
    project.mkdir()
    project.chmod(0o2775)
    mask = os.umask(0o002)
    try:
        run = RunFolder.create(project / "runs", "mine")
        write_atomic(run.plan, "{}")
        run.record("submitted", job_id="5")
        write_death(run, "5.0", {"rank": 1, "message": "broke"})
    finally:
        os.umask(mask)
    assert [str(path) for path in [run.path, *run.path.rglob("*")] if path.stat().st_mode & 0o077] == []


def test_s12_a_log_that_is_a_link_is_not_opened_to_a_group(tmp_path: Path) -> None:
    """Nor is a file of somebody else's: the mode of what a link points to stays."""
    run = RunFolder.create(tmp_path / "runs", "shared", group=grp.getgrgid(os.getegid()).gr_name)
    victim = tmp_path / "private"
    victim.write_text("mine")
    victim.chmod(0o600)
    (run.logs / "5_0.out").symlink_to(victim)
    show_logs(run.path)
    assert victim.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["attempts.jsonl", "job.json", "submit.lock"])
def test_s13_a_planted_link_leads_nowhere(name: str, tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """What it points to stays as it was, however the submission ends."""
    run, victim = make_run(tmp_path), tmp_path / "victim"
    victim.write_text("mine")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(victim)
    fake_slurm.say("sbatch", "Submitted batch job 42\n")
    with contextlib.suppress(LauncherError):
        submit(make_request(run.path))
    assert victim.read_text() == "mine"


def test_s13_files_are_replaced_not_followed(tmp_path: Path) -> None:
    """An atomic write replaces the link itself; an append refuses it."""
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("mine")
    link.symlink_to(victim)
    with pytest.raises(OSError):
        append_json_line(link, {"x": 1})
    write_atomic(link, "ours")
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == ("mine", "ours", False)


def test_s13_no_predictable_name_in_a_shared_temporary_folder() -> None:
    """mkdtemp and friends only, never a fixed path below /tmp."""
    assert calls("tempfile.mktemp") == []
    fixed = [
        f"{path.name}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"/(var/)?tmp/\w", node.value)
    ]
    assert fixed == []


@pytest.mark.parametrize("name", ["../escape", "/etc/x", "a/b", "..", ".", "a\\nb", "-rf", ""])
def test_s14_a_name_cannot_leave_the_runs_folder(name: str) -> None:
    """It becomes a folder's name, a job's name and a W&B id."""
    with pytest.raises(RecipeError):
        recipe_from_text(GOOD, "r.yaml", [f"name={name}"])


@pytest.mark.parametrize("name", ["latest", "step-1", "step-000001x", "step-../../etc", "..", "step-000001\n"])
def test_s14_only_folders_that_are_named_like_checkpoints_are(name: str, tmp_path: Path) -> None:
    """There is no file that names the latest one; links do not count."""
    run = make_run(tmp_path)
    run.checkpoints.mkdir(exist_ok=True)
    if "/" not in name and name != "..":
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step-000007").symlink_to("/etc")
    assert kept_checkpoints(run) == []


def test_s15_nothing_is_removed_outside_of_our_marks(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """With a home folder as output_dir: a refused submission and `gc` leave everything that is not a run."""
    home = tmp_path / "home"
    (home / "Documents").mkdir(parents=True)
    (home / "Documents" / "thesis.tex").write_text("years")
    (home / "step-000001").mkdir()
    fake_slurm.say("sbatch", stderr="sbatch: error: Invalid qos specification\n", status=1)
    with pytest.raises(ClusterError):
        submit(make_request(home))
    assert find_garbage(home) == []
    assert (home / "Documents" / "thesis.tex").read_text() == "years" and (home / "step-000001").is_dir()


# --- 18 to 20: what comes from elsewhere ------------------------------------------------------------


def test_s18_dependencies_are_pinned_and_come_from_one_index() -> None:
    """A second index lets whoever registers a name there first win."""
    top = PACKAGE.parent
    lines = [line for line in (top / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) > 50 and all(re.match(r"[\w.\-]+==[\w.!+]+( ;.*)?$", line) for line in lines)
    scripts = [path for folder in ("scripts", ".ci") for path in (top / folder).rglob("*") if path.is_file()]
    assert not [path for path in scripts if "--extra-index-url" in path.read_text(errors="replace")]


@quick
@given(st.text(max_size=60), st.sampled_from(["|", "\n", "n[1-999999999]", "%", ";"]))
def test_s19_slurms_text_is_parsed_as_if_an_enemy_wrote_it(text: str, extra: str) -> None:
    """Job names hold what their owners like; no line makes an exception, and a host list is never expanded."""
    for line in (
        text,
        extra.join([text, "42", "RUNNING", text]),
        f"42|{extra}|{text}",
        f"{text}|COMPLETED|0:0|{extra}",
    ):
        _parse_squeue(line)
        _parse_sacct(line)
    assert sum(map(len, names(f"n[1-999999999],{text}"))) < 1000


def test_s20_no_archive_is_ever_unpacked() -> None:
    """There is nothing to defend: artifacts are folders."""
    modules = {"tarfile", "zipfile"}
    imported = [
        f"{path.name}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and modules & {alias.name for alias in node.names})
        or (isinstance(node, ast.ImportFrom) and node.module in modules)
    ]
    assert imported == [] and calls("shutil.unpack_archive") == []


def test_s21_slurms_refusal_is_put_in_plain_words(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """Cancelling somebody else's job."""
    from launcher.runs.slurm import cancel_job

    fake_slurm.say(
        "scancel", stderr="scancel: error: Kill job error on job id 42: Access/permission denied\n", status=210
    )
    with pytest.raises(LauncherError, match="belongs to another user"):
        cancel_job("42")
