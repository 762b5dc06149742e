"""`scripts/bench trial`: whether what a trial picks holds: winner and runner-up again, with three new seeds.

Two sets of rows on the quickstart's base: its own questions and answers, and functions to be written from their
signature and docstring, which is harder. Everything is done by the commands that a user would type. On both sets it
also trains destructively on purpose (thirty times the advised learning rate) and notes what the retention set says.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults_table import machine

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "tiny-cpu.yaml"
SEEDS = 3
DESTRUCTIVE = 30
LONGEST_CHARACTERS = 600
MOST_ROWS = 1500


# ---------------------------------------------------------------- the harder set


def functions() -> Iterator[tuple[str, str]]:
    """(signature and docstring, body) of every function of Python's own library that is short enough."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                head = "\n".join(lines[node.lineno - 1 : node.body[1].lineno - 1])
                body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
                if len(head) + len(body) <= LONGEST_CHARACTERS:
                    yield head, body


def make_code(folder: Path) -> Path:
    """Rows of messages from `functions`, at most MOST_ROWS of them, evenly taken."""
    folder.mkdir(parents=True)
    found = list(dict.fromkeys(functions()))
    step = max(1, len(found) // MOST_ROWS)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for head, body in found[::step][:MOST_ROWS]:
            said = [{"role": "user", "content": f"Complete this function.\n{head}"}]
            file.write(json.dumps({"messages": [*said, {"role": "assistant", "content": body}]}) + "\n")
    return folder


# ---------------------------------------------------------------- commands


def launcher(home: Path, *words: str) -> Any:
    """What `launcher WORDS --json` prints.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    command = [sys.executable, "-m", "launcher.cli", *words, "--json"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ = os.environ | offline | {"PYTHONPATH": str(ROOT), "LAUNCHER_RUNS": str(home / "runs")}
    ran = subprocess.run(command, env=environ, cwd=home, text=True, capture_output=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit {ran.returncode}\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout)


def confirmed(home: Path, rows: Path, steps: int) -> dict[str, Any]:
    """One trial on `rows`, and its first two again with seeds that nothing was chosen by."""
    began_s = time.monotonic()
    told = launcher(home, "trial", str(RECIPE), *of(rows, steps), f"train.eval_steps={steps}", "--local")
    again = launcher(home, "trial", told["trial"], "--confirm", "--seeds", str(SEEDS))
    return {"trial": told, "again": again, "minutes": (time.monotonic() - began_s) / 60}


def of(rows: Path, steps: int) -> list[str]:
    """Overrides of every run on a set; text of the base's own is what it must not forget."""
    return [
        f"data.train=[{{path: {rows}, format: messages}}]",
        f"train.max_steps={steps}",
        "data.retention=builtin",
    ]


def forgets(home: Path, rows: Path, steps: int, method: str) -> list[dict[str, Any]]:
    """The retention set before and after a run at the advised learning rate, and at DESTRUCTIVE times as much."""
    words = [*of(rows, steps), f"method={method}"]
    advised = launcher(home, "plan", str(RECIPE), *words, "train.learning_rate=auto")
    rate = next(float(each["value"]) for each in advised["advice"] if each["field"] == "train.learning_rate")
    return [_retained(home, words, method, rate * factor) for factor in (1, DESTRUCTIVE)]


def _retained(home: Path, words: list[str], method: str, rate: float) -> dict[str, Any]:
    submitted = launcher(home, "submit", str(RECIPE), *words, f"train.learning_rate={rate:g}", "--local")
    result = json.loads((Path(submitted["path"]) / "result.json").read_text())
    return {"method": method, "learning_rate": rate, "result": result}


# ---------------------------------------------------------------- the page


def page(found: dict[str, dict[str, Any]], retained: dict[str, list[dict[str, Any]]], command: str) -> str:
    """Everything as Markdown."""
    lines = [
        f"# Trials on {machine()}, {datetime.date.today().isoformat()}",
        "",
        f"Written by `{command}` on the base of `scripts/quickstart`. *answers*: the quickstart's questions",
        "and answers; *code*: bodies of functions of Python's library from signature and docstring. Loss: of held-out",
        f"rows. Again: winner and runner-up with {SEEDS} seeds that nothing was chosen by, on the same held-out rows.",
    ]
    for name, told in found.items():
        lines += [
            "",
            f"## {name} ({told['minutes']:.0f} min)",
            "",
            "| candidate | status | steps | loss | forgets | train s | MB |",
        ]
        lines += ["|---|---|---:|---:|---:|---:|", *(_line(row) for row in told["trial"]["rows"])]
        lines += ["", "| again | loss | +- | losses |", "|---|---:|---:|---|"]
        for row in told["again"]["rows"]:
            each = ", ".join(f"{loss:.4f}" for loss in row["losses"])
            lines.append(f"| {row['candidate']} | {row['validation_loss']:.4f} | {row['spread']:.4f} | {each} |")
        lines += ["", verdict(told)]
    lines += [
        "",
        "## Destructive on purpose",
        "",
        f"LoRA and full fine-tuning at the advised learning rate and at {DESTRUCTIVE} times as much, on each set.",
        "",
        "| set | method | learning rate | retention loss before | after | rise of perplexity | warning |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for name, each in retained.items():
        lines += [_retention(name, one) for one in each]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    def shown(name: str, form: str, factor: float = 1.0) -> str:
        return "" if row[name] is None else format(row[name] * factor, form)

    cells = [row["candidate"], row["status"], f"{row['steps']}/{row['of_steps']}", shown("validation_loss", ".4f")]
    cells.append(shown("retention_change", "+.4f"))
    return "| " + " | ".join([*cells, shown("train_s", ".0f"), shown("artifact_bytes", ".1f", 1e-6)]) + " |"


def verdict(told: dict[str, Any]) -> str:
    """Whether the trial's winner won again."""
    said, noise = told["again"]["confirms"], told["again"]["smallest_difference"]
    loss = {row["candidate"]: row["validation_loss"] for row in told["again"]["rows"]}
    gap = loss[said["runner_up"]] - loss[said["winner"]]
    return f"Winner {said['winner']}: {said['outcome']}; better by {gap:.4f}, chance explains {noise:.4f} (95 %)."


def _retention(name: str, each: dict[str, Any]) -> str:
    result = each["result"]
    loss = result["retention_loss"]
    words = ", ".join(warning["code"] for warning in result["warnings"]) or "none"
    cells = [name, each["method"], f"{each['learning_rate']:g}", f"{loss['before']:.4f}", f"{loss['after']:.4f}"]
    return "| " + " | ".join([*cells, f"{result['retention_rise']:+.0%}", words]) + " |"


def main(arguments: list[str]) -> int:
    """Run the parts asked for and write the page."""
    parser = argparse.ArgumentParser(prog="scripts/bench trial", description=__doc__)
    parser.add_argument(
        "--quickstart", type=Path, default=ROOT / "quickstart", help="folder that scripts/quickstart made"
    )
    parser.add_argument("--sets", default="answers,code")
    parser.add_argument("--steps", type=int, default=120, help="of a whole run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    options = parser.parse_args(arguments)
    if not (options.quickstart / "base").is_dir():
        print(f"{options.quickstart}/base is not there; run scripts/quickstart first", file=sys.stderr)
        return 2
    command = "scripts/bench " + " ".join(["trial", *arguments])
    target = options.out / f"trial-{machine()}-{datetime.date.today().isoformat()}.md"
    home = Path(tempfile.mkdtemp(prefix="trial-"))
    try:
        (home / "quickstart").symlink_to(options.quickstart.resolve())
        sets = {"answers": home / "quickstart" / "qa", "code": home / "code"}
        found, retained = {}, {}
        for name in options.sets.split(","):
            rows = make_code(sets[name]) if name == "code" else sets[name]
            found[name] = confirmed(home, rows, options.steps)
            print(f"{name}: {verdict(found[name])}", flush=True)
            retained[name] = [one for method in ("lora", "full") for one in forgets(home, rows, options.steps, method)]
            print("\n".join(_retention(name, one) for one in retained[name]), flush=True)
            # Written as it goes: what comes next may fail, and an hour of work with it.
            target.write_text(page(found, retained, command), encoding="utf-8")
        print(target.name)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0
