"""Damaged files of a run, by chance: a report shows what is left, a run goes on or asks in one sentence."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutating import mutations, returns_or_refuses

from tinyllama_ds.checkpoint.format import (
    CheckpointManifest,
    File,
    Health,
    OptimizerRecord,
    Progress,
    model_of,
    read_manifest,
)
from tinyllama_ds.config.recipe import GuardSettings
from tinyllama_ds.evaluation.scores import scores_table
from tinyllama_ds.health.guard import AnomalyGuard
from tinyllama_ds.launch.lock import _owner_of
from tinyllama_ds.launch.supervisor import _read_state
from tinyllama_ds.model.config import model_config
from tinyllama_ds.model.probe import Probe
from tinyllama_ds.numbers import duration
from tinyllama_ds.report import run_page
from tinyllama_ds.report.charts import achieved_mixture, planned_mixture
from tinyllama_ds.report.history import read_history, read_metrics
from tinyllama_ds.report.run_page import summarize
from tinyllama_ds.report.sample_losses import differences_of_losses, loss_table
from tinyllama_ds.run.identity import changes_between, identity_of
from tinyllama_ds.run.ledger import ROLLED_BACK, SKIPPED, Entry, read_ledger
from tinyllama_ds.run.resolve import is_chat_run
from tinyllama_ds.run.run_file import read_run_file
from tinyllama_ds.run.sinks import JsonlWriter
from tinyllama_ds.run.starts import reject_lost_checkpoints

STAGE = {"name": "only", "tokens": 800, "global_batch_tokens": 100, "weights": {"a": 0.7, "b": 0.3}, "ramp_tokens": 10}
DESCRIPTION = {
    "recipe": {"name": "small", "sequence_length": 32, "stages": [STAGE]},
    "model": model_config("test").to_dict(),
    "deepspeed_config": {
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "scheduler": {"params": {"a": 1}},
    },
    "data": {"train": {"a": {"tokens": 5, "mask_sha256": ["x"]}}},
    "plan": {"steps": 8, "tokens": 800},
    "parent": {"checkpoint": "/runs/p/checkpoints/step_00000002", "step": 2, "tokens": 200, "manifest_sha256": "0"},
    "versions": {"torch": "2"},
    "history": [],
}
FIGURES = {"Train/Loss": 3.5, "Train/GradNorm": None, "Speed/TokensPerSecond": 100.0, "Speed/MFU": 0.5, "Tokens/a": 70}
GUARD = {"Guard/Spikes": 1, "Guard/FirstSample": 3, "Guard/LastSample": 4, "Checkpoint/GiB": 0.0}
ROWS = [{"step": step, "tokens": 100 * step, "seconds": 1.5 * step} | FIGURES for step in (1, 2)]
START = {"time": "2026-01-01T00:00:00+00:00", "step": 2, "tokens": 200, "reached": 3, "hosts": {"n": 2}, "left_out": 8}
TASK = {"step": 2, "tokens": 200, "task": "piqa", "metric": "acc", "value": 0.5, "stderr": 0.1}


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


METRICS = lines(*ROWS, {"step": 2, "tokens": 200} | GUARD)
SHOWN = {
    "run.json": json.dumps(DESCRIPTION, indent=1).encode(),
    "status.json": json.dumps({"state": "running", "step": 2, "tokens": 200}).encode(),
    "starts.jsonl": lines(START, START | {"restart": 1}),
    "validation.jsonl": lines({"tokens": 200, "source": "a", "losses": [3.5, 7.0], "targets": [1, 2]}),
    "samples.jsonl": lines({"step": 2, "tokens": 200, "prompt": "the", "text": "small"}),
    "tasks.jsonl": lines(TASK, TASK),
    "ledger.jsonl": lines(asdict(Entry(ROLLED_BACK, 3, 16, 23, "spike")), asdict(Entry(SKIPPED, 4, 32, 39, "bad"))),
}


def show(run_dir: Path) -> None:
    """All text of a report; drawing would take too long."""
    history = read_history(run_dir)
    now = summarize(history, 200, is_held=False)
    json.dumps(now, allow_nan=False)
    duration(now.get("seconds") or 0.0)
    for section in (run_page._starts, run_page._spikes, run_page._samples, run_page._machine):
        section(history)
    list(map(scores_table, history.scores))
    json.dumps(history.description, ensure_ascii=False)
    losses = differences_of_losses({"a": history, "b": history}, dict.fromkeys("ab", run_dir))
    json.dumps([difference.to_dict() for difference in losses], allow_nan=False)
    loss_table(losses).as_text()
    planned_mixture(history, ["a", "b"])
    achieved_mixture(history, ["a", "b"])


def resume(path: Path) -> None:
    """What a start makes of the figures before it, in another place."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        rows = JsonlWriter(Path(folder, path.name), 1)
        rows.write({"step": 2})
        rows.close()
        assert json.loads(Path(folder, path.name).read_bytes().splitlines()[-1]) == {"step": 2}
        assert rows.last_step >= 0
        reject_lost_checkpoints(path.parent, first_step=2**60)


@given(content=mutations(METRICS))
def test_damaged_metrics(content: bytes) -> None:
    def read(path: Path) -> None:
        resume(path)
        read_metrics(path.parent)
        show(path.parent)

    returns_or_refuses(read, content, "metrics.jsonl")


@pytest.mark.parametrize("name", SHOWN)
@given(data=st.data())
def test_a_damaged_file_next_to_the_metrics(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metrics.jsonl").write_bytes(METRICS)
        Path(folder, name).write_bytes(data.draw(mutations(SHOWN[name])))
        show(Path(folder))
        _read_state(Path(folder, name))


def compare(path: Path) -> None:
    held = read_run_file(path.parent)
    if held is not None:
        list(changes_between(identity_of(held.description), identity_of(DESCRIPTION)))
        is_chat_run(held.description)


def read_all_of_manifest(path: Path) -> None:
    manifest = read_manifest(path.parent)
    model_of(path.parent, manifest.model)
    AnomalyGuard(GuardSettings(), manifest.health.guard)
    is_chat_run(manifest.run)
    json.dumps(asdict(manifest))


PROBE = Probe([1, 2], None, 3.5, "float32", {})
MANIFEST = CheckpointManifest(
    Progress(2, 16, 200, "0" * 64),
    2,
    3,
    "float32",
    model_config("test").to_dict(),
    DESCRIPTION,
    {"model.norm.weight": [64]},
    OptimizerRecord("AdamW", 2, [{"lr": 0.1, "betas": [0.9, 0.95]}], {"global_steps": 2}),
    {"weights.safetensors": File(3, "0" * 64)},
    Health(
        {"skipped": 1, "window": {"loss": [1.5], "grad_norm": [2.5]}}, [[16, 23]], Probe([1, 2], None, 3.5, "f", {})
    ),
)
NEEDED: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "run.json": (SHOWN["run.json"], compare),
    "ledger.jsonl": (SHOWN["ledger.jsonl"], lambda path: read_ledger(path.parent)),
    "manifest.json": (json.dumps(asdict(MANIFEST)).encode(), read_all_of_manifest),
    "lock.json": (
        json.dumps({"pid": 1, "host": "h", "started": 5, "boot": "b"}).encode(),
        lambda path: _owner_of(path.read_bytes()),
    ),
}


@pytest.mark.parametrize("name", NEEDED)
@given(data=st.data())
def test_a_damaged_required_file(name: str, data: st.DataObject) -> None:
    valid, read = NEEDED[name]
    returns_or_refuses(read, data.draw(mutations(valid)), name)
