"""A run directory after a bad day: every file of it in every state, read by all that read a run.

What a run cannot be without is asked for in one sentence; without the rest it goes on. No reader ends in a traceback.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from forked import pretrain
from launching import read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import choose_checkpoint, find_checkpoints, newest_progress
from tinyllama_ds.checkpoint.retention import Retention, remove_old_checkpoints, sweep_leftovers
from tinyllama_ds.cli import main
from tinyllama_ds.commands.trained.stored import open_stored
from tinyllama_ds.errors import EXIT_CONFIG, ConfigError
from tinyllama_ds.launch.lock import is_held
from tinyllama_ds.report.history import read_history, read_metrics
from tinyllama_ds.report.run_page import summarize
from tinyllama_ds.run.directory import check_run_directory
from tinyllama_ds.run.ledger import ROLLED_BACK, Entry, read_ledger, write_ledger
from tinyllama_ds.run.resolve import Options, resolve_run
from tinyllama_ds.run.starts import append_line

STEPS, HALF = 8, 4
MANIFEST = f"checkpoints/step_{STEPS:08d}/manifest.json"
AUXILIARY = ("status.json", "starts.jsonl", "metrics.jsonl", "samples.jsonl", "tasks.jsonl", "scores/suite.json")
FILES = (*AUXILIARY, "run.json", "ledger.jsonl", "lock.json", "tokenizer.model", "stop", MANIFEST)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").touch()


def put(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return damage


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    put(content[: len(content) // 2])(path)


def spoil_values(value: object) -> Callable[[Path], None]:
    """Another value in the place of every leaf, or every branch, of a file of JSON."""

    def damage(path: Path) -> None:
        spoilt = []
        with suppress(ValueError):
            text = path.read_text()
            for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
                spoilt += [json.dumps(row) for row in variants(json.loads(line), value)]
        put("\n".join([*spoilt, ""]).encode() if path.suffix == ".jsonl" else "".join(spoilt[:1]).encode())(path)

    return damage


def variants(row: object, value: object) -> list[dict]:
    return [row | {key: value} for key in row] + [dict.fromkeys(row, value)] if isinstance(row, dict) else []


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink, "empty": put(b""), "cut short": cut_short, "zeros": put(bytes(500)),
    "not UTF-8": put(b'{"step": "\xff"}\n'), "a folder": put_folder, "nested": put(b"[" * 100_000),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere"))[0],
    **{f"is {text}": put(text.encode() + b"\n") for text in ("[]", "{}", "null", "7", '"x"', "NaN", "9" * 50)},
    **{f"values {text}": spoil_values(json.loads(text)) for text in
       ("null", "[]", "{}", '"x"', "-5", "true", "1.5", "NaN", "1e300", "1" * 40, '[{"x": []}]', '{"x": [1]}')},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A finished run with every file that a run can have."""
    root = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(root / "small.toml", STEPS, save_every=HALF)
    config = write_deepspeed_config(root / "ds.json", 1, micro_batch=8)
    run_dir = root / "run"
    finished = pretrain(recipe, config, data_dir, run_dir, 1)
    assert finished.returncode == 0, finished.stderr
    score = {"task": "piqa", "metric": "acc", "value": 0.5, "stderr": 0.1}
    suite = {
        "tokens": 512,
        "scores": [score],
        "percent": [{"benchmark": "PIQA", "value": 50.0, "stderr": 1.0}],
        "average": {"value": 50.0},
        "published": [{"model": "x", "scores": [50.0], "average": 50.0, "tokens": 9}],
    }
    (run_dir / "scores").mkdir()
    (run_dir / "scores" / "suite.json").write_text(json.dumps(suite))
    append_line(run_dir / "tasks.jsonl", {"step": 2, "tokens": 512} | score)
    append_line(run_dir / "samples.jsonl", {"step": 2, "tokens": 512, "prompt": "the", "text": "small"})
    append_line(run_dir / "lock.json", {"pid": 1, "host": "elsewhere", "boot": "b", "started": 5})
    write_ledger(run_dir, [Entry(ROLLED_BACK, 90, 5000, 5001, "spike")])
    (run_dir / "stop").touch()
    return Options(str(recipe), config, data_dir, run_dir)


def copy_of(whole: Options, to: Path) -> Options:
    """Linked, so that it costs nothing; what is damaged is another file then."""
    shutil.copytree(whole.run_dir, to, copy_function=os.link)
    return replace(whole, run_dir=to)


def start(options: Options) -> object:
    return check_run_directory(resolve_run(options, 1, "cpu", bf16=False))


def beside(options: Options) -> Options:
    return replace(options, run_dir=options.run_dir.with_name("new"))


def purge(options: Options) -> None:
    sweep_leftovers(options.run_dir)
    remove_old_checkpoints(options.run_dir, Retention(2, 10**9))


def show(options: Options) -> None:
    history = read_history(options.run_dir)
    json.dumps(summarize(history, newest_progress(options.run_dir)[1], is_held(options.run_dir)))
    read_metrics(options.run_dir)


READERS: dict[str, Callable[[Options], object]] = {
    "start": start,
    "branch": lambda options: start(replace(beside(options), branch_from=options.run_dir)),
    "init": lambda options: start(replace(beside(options), init_from=options.run_dir)),
    "open the model": lambda options: open_stored(options.run_dir),
    "show": show,
    "audit": lambda options: read_ledger(options.run_dir),
    "purge": purge,
    "choose": lambda options: choose_checkpoint(options.run_dir),
}  # fmt: skip


def _pairs() -> Iterator[ParameterSet]:
    """The readers that resolve a whole run see a few damages, and all with --all-faults."""
    few = ("missing", "empty", "zeros", "not UTF-8", "a folder", "values {}", "values NaN")
    for reader, damage in product(READERS, DAMAGES):
        is_slow = reader in ("start", "branch", "init") and damage not in few
        yield pytest.param(reader, damage, marks=[pytest.mark.all_faults] if is_slow else [])


@pytest.mark.parametrize(("reader", "damage"), _pairs())
def test_no_reader_ends_in_a_traceback(reader: str, damage: str, whole: Options, tmp_path: Path) -> None:
    for name in FILES:
        options = copy_of(whole, tmp_path / name.replace("/", "_") / "run")
        DAMAGES[damage](options.run_dir / name)
        refusal = refused(READERS[reader], options)
        assert "\n" not in refusal
        is_needed = name not in AUXILIARY or (name == "metrics.jsonl" and reader == "show")
        assert not refusal or is_needed or (name == "status.json" and damage == "a folder"), name


def refused(reader: Callable[[Options], object], options: Options) -> str:
    """Why it was refused, if it was."""
    try:
        reader(options)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("damage", ["empty", "zeros", "a folder", "values {}", "values NaN", "values 1e300"])
def test_a_report_shows_what_is_left(damage: str, whole: Options, tmp_path: Path) -> None:
    """Everything but the figures damaged, then the figures alone."""
    options = copy_of(whole, tmp_path / "run")
    for name in (*AUXILIARY, "run.json", "ledger.jsonl", "lock.json", MANIFEST):
        if name != "metrics.jsonl":
            DAMAGES[damage](options.run_dir / name)
    assert main(["report", str(options.run_dir)]) == 0
    assert (options.run_dir / "report.html").stat().st_size > 1000
    options = copy_of(whole, tmp_path / "another")
    DAMAGES[damage](options.run_dir / "metrics.jsonl")
    assert main(["report", str(options.run_dir)]) in (0, EXIT_CONFIG)


@pytest.mark.parametrize("damage", ["empty", "not UTF-8", "is []", "values null"])
def test_training_goes_on_without_what_is_auxiliary(damage: str, whole: Options, tmp_path: Path) -> None:
    options = copy_of(whole, tmp_path / "run")
    shutil.rmtree(find_checkpoints(options.run_dir)[-1])
    for name in ("ledger.jsonl", "lock.json", "stop"):
        (options.run_dir / name).unlink()
    for name in (*AUXILIARY, "run.json", "tokenizer.model"):
        DAMAGES[damage](options.run_dir / name)
    leftovers(options.run_dir)
    finished = pretrain(Path(options.recipe), options.deepspeed_config, options.data, options.run_dir, 1)
    assert finished.returncode == 0, finished.stderr
    assert f"resumed at step {HALF} " in finished.stdout
    assert "checkpoint save failed" not in finished.stdout
    assert len(find_checkpoints(options.run_dir)) == 2
    assert json.loads((options.run_dir / "status.json").read_text())["state"] == "finished"
    assert json.loads((options.run_dir / "run.json").read_text())["recipe"]["name"] == "small"
    assert len(read_series(options.run_dir, "Train/Loss")) >= STEPS - HALF
    assert [path.name for path in (options.run_dir / "checkpoints").glob(".*")] == []


def leftovers(run_dir: Path) -> None:
    """Files where folders are made, folders where files are written, and folders without a manifest."""
    checkpoints = run_dir / "checkpoints"
    (checkpoints / f".step_{STEPS:08d}.partial").write_text("x")
    (checkpoints / f".trash-step_{HALF:08d}").mkdir()
    (checkpoints / f".step_{STEPS:08d}.dry_run").mkdir()
    (checkpoints / f"step_{STEPS:08d}").mkdir()
    (checkpoints / f"step_{STEPS:08d}" / "half.safetensors").touch()
    (checkpoints / "step_00000003").write_text("x")


@pytest.mark.parametrize("name", ["checkpoints", "quarantine", "logs"])
def test_a_file_in_the_place_of_a_folder_is_named(name: str, whole: Options, tmp_path: Path) -> None:
    options = copy_of(whole, tmp_path / "run")
    shutil.rmtree(options.run_dir / name, ignore_errors=True)
    (options.run_dir / name).touch()
    with pytest.raises(ConfigError, match=rf"{name}: is a file; expected a folder of the run, move the file away"):
        start(options)


@pytest.mark.parametrize("lost", ["manifests", "folders"])
def test_a_run_that_has_lost_its_checkpoints_does_not_begin_again(lost: str, whole: Options, tmp_path: Path) -> None:
    options = copy_of(whole, tmp_path / "run")
    for checkpoint in find_checkpoints(options.run_dir):
        (checkpoint / "manifest.json").unlink() if lost == "manifests" else shutil.rmtree(checkpoint)
    reason = "none of 2 folders has" if lost == "manifests" else f"the run has saved one at step {STEPS}; restore it"
    with pytest.raises(ConfigError, match=reason):
        start(options)
    (options.run_dir / "metrics.jsonl").unlink()
    (options.run_dir / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"but no run\.json, so the run is unknown; restore .*run\.json, or"):
        start(options)


@pytest.mark.parametrize("name", ["v[1]", "a*b?c with blanks", 'it\'s "quoted" 日本語-ü', "two\nlines $HOME;x&y"])
def test_a_run_lives_in_any_path(name: str, whole: Options, tmp_path: Path) -> None:
    """Characters that glob, a shell or a line would take for something else."""
    options = copy_of(whole, tmp_path / name / "run")
    for wish in ("ledger.jsonl", "stop"):
        (options.run_dir / wish).unlink()
    shutil.rmtree(find_checkpoints(options.run_dir)[-1])
    config = options.deepspeed_config
    if name == "v[1]":  # loaded into a different layout
        config = write_deepspeed_config(tmp_path / name / "ds.json", 3, micro_batch=8)
    finished = pretrain(Path(options.recipe), config, options.data, options.run_dir, 1)
    assert finished.returncode == 0, finished.stderr
    assert f"resumed at step {HALF} " in finished.stdout
    assert main(["generate", str(options.run_dir), "hello", "--max-new-tokens", "1"]) == 0
