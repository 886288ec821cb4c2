"""A small ladder that really trains: its sizes are ordinary runs, whose finished models are fitted."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import pretrain
from hosts import start_hosts, why_not
from ladders import write_ladder
from launching import read_series, read_series_so_far, wait_until

from tinyllama_ds.cli import main
from tinyllama_ds.errors import EXIT_RESTART
from tinyllama_ds.ladder.definition import load_ladder
from tinyllama_ds.ladder.runs import config_of, recipe_of

TOKENS = [512, 1024, 2048]
SHARES = {"decay": 0.5, "warmup": 0.25}


def test_the_runs_of_a_ladder_are_fitted(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained as pretrain would; the command finds all of them finished."""
    monkeypatch.setattr("tinyllama_ds.ladder.result.DRAWS", 10)
    path, runs = write_ladder(tmp_path, tokens=TOKENS, **SHARES), tmp_path / "runs"
    runs.mkdir()
    for size in (ladder := load_ladder(str(path))).sizes:
        (runs / f"{size.name}.toml").write_text(recipe_of(ladder, size))
        (runs / f"{size.name}.json").write_text(json.dumps(config_of(ladder, size), indent=2) + "\n")
        finished = pretrain(runs / f"{size.name}.toml", runs / f"{size.name}.json", data_dir, runs / size.name, 1)
        assert finished.returncode == 0, finished.stderr
    arguments = ["ladder", str(path), "--data", str(data_dir), "--run-dir", str(runs), "--num-gpus", "1", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    for source, of_source in found["sources"].items():
        assert [held["predicted"]["tokens"] for held in of_source["held_out"]] == TOKENS
        measured = read_series(runs / "d4", f"Validation/Loss/{source}")[1:]  # the first one is before any step
        assert [held["measured"] for held in of_source["held_out"]] == measured
        assert of_source["prediction"]["low"] < of_source["prediction"]["loss"] < of_source["prediction"]["high"]
    assert (runs / "ladder.html").is_file()


@pytest.mark.real
def test_an_interrupted_ladder_continues(data_dir: Path, tmp_path: Path) -> None:
    """Stopped in its second size by a signal, it saves; started again, the first size is not trained again."""
    path, runs = write_ladder(tmp_path, tokens=[2560, 5120, 25_600], decay=0.2), tmp_path / "runs"
    arguments = ["ladder", str(path), "--data", str(data_dir), "--run-dir", str(runs), "--num-gpus", "1"]
    program = [sys.executable, "-m", "tinyllama_ds.cli", *arguments, "--skip-doctor"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(read_series_so_far(runs / "d2", "Train/Loss")) > 3, "the second size never trained")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == EXIT_RESTART, errors
    before = (runs / "d1" / "metrics.jsonl").read_bytes()
    finished = subprocess.run(program, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "1 of 4 sizes are finished already" in finished.stderr
    assert (runs / "d1" / "metrics.jsonl").read_bytes() == before
    assert len((runs / "d2" / "starts.jsonl").read_text().splitlines()) == 2
    assert "predicted final validation loss" in finished.stdout


@pytest.mark.real
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_hosts_train_a_size_each(data_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two hosts with sshd: the head node starts a launcher on each, and fits when all sizes are finished."""
    path, runs, hostfile = write_ladder(tmp_path, tokens=TOKENS, **SHARES), tmp_path / "runs", tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    with start_hosts(2, tmp_path_factory.mktemp("hosts")) as hosts:
        arguments = ("--data", data_dir, "--run-dir", runs, "--hostfile", hostfile, "--skip-doctor")
        finished = hosts[0].tinyllama_ds("ladder", path, *arguments, timeout=900)
        assert finished.returncode == 0, finished.stderr
    starts = {size: json.loads((runs / size / "starts.jsonl").read_text()) for size in ("d1", "d2", "d3", "d4")}
    assert {host for start in starts.values() for host in start["hosts"]} == {"node1", "node2"}
    assert (runs / "ladder.html").is_file()
