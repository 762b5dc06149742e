"""`scripts/bench memory`: what it counts is what is there, and what it writes can be read again."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
POINT = "cpu-17m-full-z0x1-kept-1x64"


def load(name):
    """A module of scripts/lib, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "lib" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench, step = load("bench_memory"), load("bench_step")


def test_the_counter_knows_what_is_alive_and_what_was():
    """Tensors from before are found, views cost nothing, the peak stays when tensors go."""
    before = torch.zeros(1000)
    with step.CpuCounter() as counter:
        start = counter.now
        assert start >= before.untyped_storage().nbytes()
        first = torch.ones(250_000)
        view = first.view(500, 500).t()
        second = first + 1
        assert counter.now - start == 2_000_000
        del second
        assert counter.now - start == 1_000_000
        assert counter.peak - start == 2_000_000
    del view, before


def test_the_counter_sees_what_backward_makes():
    """Gradients are made inside the autograd engine, not by a call of ours."""
    weight = torch.ones(1000, requires_grad=True)
    with step.CpuCounter() as counter:
        start = counter.now
        (weight * weight).sum().backward()
        assert weight.grad is not None
        assert counter.now - start == 4000


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One point, run by the script as a user runs it."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "memory", "--only", POINT, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_a_point_is_measured_and_compared(written):
    """A real model, three real steps: prediction and measurement side by side, with machine, date and versions."""
    (lines,) = (path.read_text().splitlines() for path in written.glob("memory-*.jsonl"))
    (row,) = map(json.loads, lines)
    assert row["point"] == POINT
    assert row["machine"] and row["date"] and row["measured"]["versions"]["torch"] == torch.__version__
    assert row["failed"] is None
    # 17 M fp32 weights, gradients and two moments are 16 bytes each.
    assert row["measured"]["peak_bytes"] > 15 * 16.5e6
    assert row["error"] == pytest.approx(row["predicted"]["expected_bytes"] / row["measured"]["peak_bytes"] - 1)
    # At 17 M parameters two temporaries of the largest tensor in Adam's update show.
    assert abs(row["error"]) < 0.03


def test_the_table_says_what_the_rows_say(written):
    """One line per point, and the summary."""
    (table,) = (path.read_text() for path in written.glob("memory-*.md"))
    assert f"| {POINT} | fp32 |" in table
    assert "1 of 1 points measured" in table
    assert "live storages of real tensors" in table


def test_predictions_are_renewed_beside_what_was_measured(written, tmp_path):
    """`--again` runs nothing: the measurement stays, the prediction is today's, also where an old one was wrong."""
    (source,) = written.glob("memory-*.jsonl")
    row = json.loads(source.read_text())
    outdated = row | {"error": 0.5, "predicted": row["predicted"] | {"expected_bytes": 1}}
    target = tmp_path / source.name
    target.write_text(json.dumps(outdated) + "\n")
    assert bench.main(["--again", str(target)]) == 0
    renewed = json.loads(target.read_text())
    assert renewed["measured"] == row["measured"]
    assert renewed["predicted"]["expected_bytes"] == row["predicted"]["expected_bytes"]
    assert renewed["error"] == pytest.approx(row["error"])


def test_a_point_that_is_planned_otherwise_now_has_to_be_measured_again(written, tmp_path):
    """A prediction for another optimizer says nothing about what was measured."""
    (source,) = written.glob("memory-*.jsonl")
    target = tmp_path / source.name
    target.write_text(json.dumps(json.loads(source.read_text()) | {"optim": "sgd"}) + "\n")
    with pytest.raises(ValueError, match="measure it again"):
        bench.main(["--again", str(target)])


def test_a_point_that_fails_is_a_row_with_its_error(tmp_path, monkeypatch, capsys):
    """The rest of the grid goes on, the table shows it, and the exit code tells."""

    def no_rank_answers(*_):
        raise RuntimeError("rank 0: boom")

    monkeypatch.setattr(bench, "measure", no_rank_answers)
    monkeypatch.setattr(bench, "make_folder", lambda *_: config_folder(tmp_path))
    assert bench.main(["--only", POINT, "--out", str(tmp_path)]) == 1
    (lines,) = (path.read_text().splitlines() for path in tmp_path.glob("memory-*.jsonl"))
    assert json.loads(lines[0])["failed"] == "rank 0: boom"
    assert "failed: rank 0: boom" in capsys.readouterr().out
    assert "boom" in next(tmp_path.glob("memory-*.md")).read_text()


def config_folder(parent):
    folder = parent / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(bench.CPU_MODEL))
    return folder


def test_every_point_has_a_name_of_its_own():
    """Rows of later runs replace earlier ones by name."""
    for device in ("cpu", "cuda"):
        names = [point.name for point in bench.grid(device)]
        assert len(names) == len(set(names))
        assert len(names) > 10


def test_rows_that_were_measured_before_are_not_lost(tmp_path):
    """Committed measurements are real: finite errors, machine and date in every row."""
    for path in (ROOT / "benchmarks").glob("memory-*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert row["machine"] in path.name
            assert row["date"] in path.name
            assert row["measured"] or row["failed"]


def test_an_unknown_measurement_lists_what_there_is():
    """The script explains itself."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench"), "speed-of-light"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "scripts/bench memory" in done.stderr
