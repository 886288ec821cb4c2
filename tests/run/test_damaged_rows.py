"""Lines of a run's files that a power loss or a bad disk has damaged."""

import json
from pathlib import Path

import pytest
from launching import read_series

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.report.history import read_history, read_metrics
from tinyllama_ds.report.run_page import report_page, summarize
from tinyllama_ds.run.ledger import LEDGER_FILE, SKIPPED, Entry, read_ledger, record
from tinyllama_ds.run.metrics import MetricsLogger
from tinyllama_ds.run.starts import append_line

DAMAGES = {
    "garbage": b"x\x07}{ \r step\r",
    "zeros": bytes(4096),
    "not UTF-8": b'{"step": 2, "tokens": 200, "Train/Loss": 2, "text": "\xff\xfe"}',
    "cut in the middle": b'{"step": 2, "tokens": 200, "Tra{"step": 2, "tokens": 200}',
    "a number": b"2",
    "a list": b'["step", 2]',
    "an object of something else": b'{"event": "skipped"}',
    "a step that is not a number": b'{"step": "2", "tokens": 200}',
    "nothing": b"",
}
damaged = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def log_steps(run_dir: Path, first: int, last: int) -> None:
    metrics = MetricsLogger(run_dir, {"tensorboard": {"enabled": False}}, Progress(first, 0, first * 100), "{}")
    for step in range(first + 1, last + 1):
        metrics.log(step, step * 100, {"Train/Loss": step})
        metrics.log_samples(step, step * 100, [("prompt", f"after {step}")])
    metrics.close()


def put_in_place_of(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines))


@damaged
def test_a_run_goes_on_without_the_line_and_names_it(
    damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_steps(tmp_path, 0, 4)
    files = [tmp_path / name for name in ("metrics.jsonl", "samples.jsonl")]
    for path in files:
        put_in_place_of(path, 2, damage)
    log_steps(tmp_path, 4, 5)
    assert read_series(tmp_path, "Train/Loss") == [1, 3, 4, 5]
    said = capsys.readouterr().err
    for path in files:
        assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 3, 4, 5]
        assert said.count(f"tinyllama-ds: {path}:2: damaged line, skipped") == 1


@pytest.mark.parametrize("damage", [bytes(5), b"x\n", b"{}\n" * 3, b'{"step": 4, "tokens"'], ids=repr)
def test_a_run_goes_on_after_a_damaged_end(damage: bytes, tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    log_steps(tmp_path, 3, 4)
    assert read_series(tmp_path, "Train/Loss") == [1, 2, 3, 4]


def test_a_run_goes_on_where_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(bytes(1000) + b"\n")
    log_steps(tmp_path, 3, 4)
    assert read_series(tmp_path, "Train/Loss") == [4]


@damaged
def test_a_report_skips_the_line_and_names_it(
    damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_steps(tmp_path, 0, 4)
    start = {"step": 0, "tokens": 0, "time": "then", "hosts": {"n1": 2}}
    score = {"step": 1, "tokens": 100, "task": "piqa", "metric": "acc", "value": 0.5, "stderr": None}
    for name, row in (("starts.jsonl", start), ("tasks.jsonl", score)):
        (tmp_path / name).write_text(3 * f"{json.dumps(row)}\n")
    for number in (1, 2, 4):
        record(tmp_path, Entry(SKIPPED, number, 0, 1, "not finite"))
    names = ("metrics.jsonl", "samples.jsonl", "starts.jsonl", "tasks.jsonl", LEDGER_FILE)
    for name in names:
        put_in_place_of(tmp_path / name, 2, damage)
    history = read_history(tmp_path)
    assert [len(rows) for rows in (history.samples, history.starts, history.tasks, history.ledger)] == [3, 2, 2, 2]
    assert history.points("Train/Loss")[1].tolist() == [1, 3, 4]
    assert report_page(history, summarize(history, 0, is_held=False), "here")
    said = capsys.readouterr().err.splitlines()
    assert sorted(said[-5:]) == sorted(f"tinyllama-ds: {tmp_path / name}:2: damaged line, skipped" for name in names)
    put_in_place_of(tmp_path / "metrics.jsonl", 3, damage)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]
    assert capsys.readouterr().err.endswith(
        f"tinyllama-ds: {tmp_path / 'metrics.jsonl'}:2: damaged line, skipped, and so are 1 more line of the file\n"
    )


def test_a_report_finds_the_end_before_a_long_damage(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(bytes(1_000_000))
    assert read_history(tmp_path).last["step"] == 3


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_ledger_is_rejected(damage: bytes, tmp_path: Path) -> None:
    """What it leaves out decides which samples come next."""
    for number in range(3):
        record(tmp_path, Entry(SKIPPED, number, 0, 1, "not finite"))
    put_in_place_of(tmp_path / LEDGER_FILE, 2, damage)
    with pytest.raises(ConfigError, match=rf"^{tmp_path / LEDGER_FILE}:2: not an entry of a run's ledger, "):
        read_ledger(tmp_path)


def test_a_start_is_recorded_after_an_incomplete_line(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 1)
    path = tmp_path / "starts.jsonl"
    append_line(path, {"step": 0, "tokens": 0})
    with path.open("a") as file:
        file.write('{"step": 5, "tok')
    append_line(path, {"step": 5, "tokens": 500})
    assert [start["step"] for start in read_history(tmp_path).starts] == [0, 5]
