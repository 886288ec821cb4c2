"""Samples along the way change nothing: also where blocks are compiled, which a new shape would compile again."""

from pathlib import Path

import pytest
import torch
from forked import pretrain
from launching import STEP_TOKENS, read_series, write_deepspeed_config, write_recipe
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest

SAMPLES = f'[samples]\nprompts = ["the small llama", "loss"]\nevery_tokens = {STEP_TOKENS}\nnew_tokens = 5\n'


@pytest.mark.all_faults
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_compiled_run_is_the_same_with_samples(stage: int, data_dir: Path, tmp_path: Path) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=2)
    for name, samples in (("with", SAMPLES), ("without", "")):
        recipe = write_recipe(tmp_path / f"{name}.toml", 6, save_every=6, evaluate_every=3)
        recipe.write_text(recipe.read_text() + samples)
        finished = pretrain(recipe, config, data_dir, tmp_path / name, 2, "--compile", "on")
        assert finished.returncode == 0, finished.stderr
        assert "torch.compile: on" in finished.stdout
        probe = read_manifest(find_checkpoints(tmp_path / name)[-1]).health.probe
        assert probe is not None
        assert probe.numerics_environment["compiled"], "known after the ranks' forwards are timed, too"
    assert read_series(tmp_path / "with", "Train/Loss") == read_series(tmp_path / "without", "Train/Loss")
    found, expected = (tensors_of(find_checkpoints(tmp_path / name)[-1]) for name in ("with", "without"))
    assert [place for place in expected if not torch.equal(found[place], expected[place])] == []
    assert len((tmp_path / "with" / "samples.jsonl").read_text().splitlines()) == 12
