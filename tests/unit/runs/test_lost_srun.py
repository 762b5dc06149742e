"""An srun that cannot hear its ranks any more is ended once their supervisors have said that they are gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.runs.folder import RunFolder
from launcher.runs.lost_srun import is_over

WATCH = """
import sys
from pathlib import Path
from launcher.runs.folder import RunFolder
from launcher.runs.lost_srun import watch
print(watch(RunFolder(Path(sys.argv[1])), "7.0", int(sys.argv[2]), patience_s=0.3, poll_s=0.05))
"""


def script(tmp_path: Path, run: RunFolder) -> subprocess.Popen[str]:
    """A batch script like ours: the watch beside a (fake) srun that would wait for an hour, then the last words."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/bash\nfor _ in $(seq 36000); do sleep 0.1; done\n")
    srun.chmod(0o755)
    (tmp_path / "watch.py").write_text(WATCH)
    text = (
        f'{sys.executable} watch.py {run.path} $$ &\nwatch=$!\n{srun}\nrc=$?\nkill "$watch" 2>/dev/null\necho rc=$rc\n'
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)


def test_srun_is_ended_when_a_rank_is_gone_and_the_script_goes_on(tmp_path: Path) -> None:
    """The shell sees srun's death as 137 and says its last words."""
    run = RunFolder.create(tmp_path / "runs", "tiny")
    with script(tmp_path, run) as bash:
        try:
            (run.errors / "7.0").mkdir(parents=True)
            (run.errors / "7.0" / "rank-1.json").write_text("{}")
            out, _ = bash.communicate(timeout=60)
        finally:
            bash.kill()
    assert "rc=137" in out


def test_while_no_rank_is_gone_srun_is_left_alone(tmp_path: Path) -> None:
    """Reports of ranks that are merely silent, and other attempts' errors, are no end."""
    run = RunFolder.create(tmp_path / "runs", "tiny")
    for name in ("7.0/hang-rank-1.json", "6.0/rank-1.json"):
        (run.errors / name).parent.mkdir(parents=True, exist_ok=True)
        (run.errors / name).write_text("{}")
    assert not is_over(run, "7.0")
    with script(tmp_path, run) as bash:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                bash.wait(timeout=3)
        finally:
            subprocess.run(["pkill", "-KILL", "-P", str(bash.pid)], check=False)
            bash.kill()


def test_the_watch_ends_with_its_script(tmp_path: Path) -> None:
    """A watch whose script is gone would kill somebody else's srun."""
    run = RunFolder.create(tmp_path / "runs", "tiny")
    began = time.monotonic()
    code = f"from launcher.runs.lost_srun import main; raise SystemExit(main([{str(run.path)!r}, '7.0', '1']))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, timeout=60, check=False).returncode == 0
    assert time.monotonic() - began < 60
