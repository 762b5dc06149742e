"""prepare_job: the token cache as a CPU job of its own, for which the run's job can wait.

The job runs `python -m launcher.runs.prepare_job FOLDER`; what is to be prepared stands in FOLDER/request.json, so no
word of a recipe reaches a shell.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from pathlib import Path

from launcher.errors import ClusterError, LauncherError, RecipeError
from launcher.facts.command import run_slurm
from launcher.facts.site import Site, site_facts
from launcher.facts.train_environment import train_python
from launcher.recipe.load import load_recipe_with_notices
from launcher.runs.folder import write_atomic, write_json
from launcher.runs.preview import prepare_cache
from launcher.runs.request import bad_characters
from launcher.runs.sending import clean_environment
from launcher.runs.status import runs_folder
from launcher.runs.variables import exported_names, leave_secrets, private_files, read_secrets

_TIME_MIN = 24 * 60


def submit(path: Path, overrides: list[str]) -> str:
    """Submit the job and return its id.

    Raises:
        RecipeError: the recipe, or a path that must not stand in a script.
        ClusterError, TemporaryError: this site has no Slurm, or Slurm refuses.
    """
    recipe = load_recipe_with_notices(path, overrides).recipe
    site = site_facts(recipe.slurm.site)
    if site.executor != "slurm":
        raise ClusterError("data prepare --job: this site has no Slurm; leave --job out")
    folder = (runs_folder(None) / ".prepare" / secrets.token_hex(4)).resolve()
    if bad_characters(str(folder), frozenset("'\"\\`$%")):
        raise RecipeError(f"LAUNCHER_RUNS: {str(folder)!r} must not stand in a script; choose a plain path")
    folder.mkdir(mode=0o700, parents=True)
    write_json(folder / "request.json", {"recipe": str(path.resolve()), "overrides": overrides, "cwd": str(Path.cwd())})
    write_atomic(folder / "job.sh", module_script(site, "prepare_job", folder))
    options = {
        "job-name": f"prepare-{recipe.name}",
        "ntasks": "1",
        "time": str(min(_TIME_MIN, site.max_time_min or _TIME_MIN)),
        "output": str(folder / "job.out"),
        "chdir": str(Path.cwd()),
        "partition": recipe.slurm.partition or site.default_partition,
        "account": recipe.slurm.account or site.account,
        "qos": recipe.slurm.qos or site.qos,
        "export": ",".join(exported_names(os.environ)) or "NONE",
    }
    named = [f"--{key}={value}" for key, value in options.items() if value]
    leave_secrets(folder)
    with private_files(), clean_environment():
        answer = run_slurm(["sbatch", "--parsable", *named, str(folder / "job.sh")])
    return answer.strip().split(";")[0]


def module_script(site: Site, module: str, folder: Path) -> str:
    """A job that runs one of our modules: fixed lines, the site's own set-up, and two quoted paths of ours."""
    package = str(Path(__file__).parents[2])
    words = [train_python(site), "-m", f"launcher.runs.{module}", str(folder)]
    lines = [
        "#!/bin/bash",
        "umask 077",
        *(f"module load {module} || exit 1" for module in site.modules),
        *site.setup,
        *(f"export {key}={shlex.quote(value)}" for key, value in site.env.items()),
        f"export PYTHONPATH={shlex.quote(package)}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"exec {shlex.join(words)}",
    ]
    return "\n".join(lines) + "\n"


def main(folder: Path) -> int:
    """What the job does; returns the exit code of the error's class."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    os.chdir(request["cwd"])
    os.environ |= read_secrets(folder)
    try:
        made = prepare_cache(Path(request["recipe"]), request["overrides"])
    except LauncherError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return error.exit_code
    write_json(folder / "result.json", made)
    print(f"token cache: {made['path']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
