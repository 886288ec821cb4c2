"""The published suites: their rows against what is known of them, and every task loaded and scored from a folder."""

import json
from pathlib import Path

import pytest
from published_data import BBH_TASKS, MMLU_SUBJECTS, write_published_data

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.evaluation.suites import load_suites
from tinyllama_ds.hf.convert import export
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model

WRONG_AVERAGES = {("commonsense", "TinyLlama v1.0"): 52.97, ("instruct", "Pythia-1.4B"): 17.74}


@pytest.mark.parametrize("suite", load_suites())
def test_the_scores_give_the_printed_averages_but_for_two_that_are_marked(suite: str) -> None:
    published = load_suites()[suite]
    for row in published.published:
        assert len(row.scores) == len(published.benchmarks)
        if (suite, row.model) in WRONG_AVERAGES:
            assert row.model in published.misprints
            assert row.average == pytest.approx(WRONG_AVERAGES[suite, row.model], abs=0.0051)
        elif row.printed_average is not None:
            assert row.average == pytest.approx(row.printed_average, abs=0.0051), row.model


def test_every_suite_has_all_final_models_and_baselines() -> None:
    expected = {"OPT-1.3B", "Pythia-1.0B", "Pythia-1.4B", "TinyLlama v1.0", "TinyLlama v1.1",
                "TinyLlama v1.1 Math&Code", "TinyLlama v1.1 Chinese"}  # fmt: skip
    for suite in load_suites().values():
        models = {row.model for row in suite.published}
        assert expected | set(suite.misprints) <= models
        assert len(models) == len(suite.published)


def test_the_same_token_count_is_that_of_a_checkpoint_within_a_tenth() -> None:
    for suite, tokens, model in (
        ("commonsense", 500_000_000_000, "TinyLlama, 240k steps"),
        ("commonsense", 3_000_001_000_000, "TinyLlama v1.0"),
        ("instruct", 2_100_000_000_000, "TinyLlama, 955k steps"),
    ):
        row = load_suites()[suite].nearest_checkpoint(tokens)
        assert row is not None
        assert row.model == model
    for unmatched in (1_000_000, 750_000_000_000, None):
        assert load_suites()["commonsense"].nearest_checkpoint(unmatched) is None


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model with room for HumanEval's 1,024 tokens, and the data of all suites."""
    root = tmp_path_factory.mktemp("suites")
    config = LlamaConfig(512, 32, 88, 1, 2, 1, 1200)
    export(build_model(config, "eager", seed=1).state_dict().items(), config, tokenizer, root / "hf")
    write_published_data(root / "data")
    return root / "hf", root / "data"


@pytest.mark.parametrize("suite", ["commonsense", "chinese", pytest.param("instruct", marks=pytest.mark.all_faults)])
def test_a_suite_from_a_folder(
    suite: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, data = folders
    arguments = ["evaluate", model, "--suite", suite, "--data-dir", data, "--output", tmp_path, "--device", "cpu"]
    assert main([*map(str, arguments), "--allow-code-execution"]) == 0
    found = json.loads((tmp_path / f"{suite}.json").read_text())
    assert [score["benchmark"] for score in found["percent"]] == [
        benchmark.title for benchmark in load_suites()[suite].benchmarks
    ]
    for score, benchmark in zip(found["percent"], load_suites()[suite].benchmarks, strict=True):
        assert score["shots"] == benchmark.shots, benchmark
        assert 0 <= score["value"] <= 100
        assert score["documents"] == 2 * {"MMLU": MMLU_SUBJECTS, "BBH": BBH_TASKS}.get(benchmark.title, 1)
    text = (tmp_path / f"{suite}.md").read_text()
    assert text.count("**this model**") == 1
    assert (tmp_path / f"{suite}.png").is_file()
    if suite == "instruct":
        assert found["percent"][2]["value"] == 50.0  # of HumanEval's two programs the second is right
