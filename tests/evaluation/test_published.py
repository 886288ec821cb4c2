"""The published rows against what is known of them: their printed averages, and the misprints that are marked."""

import pytest

from tinyllama_ds.evaluation.published import PUBLISHED, nearest_checkpoint
from tinyllama_ds.evaluation.suites import SUITES

WRONG_AVERAGES = {("commonsense", "TinyLlama v1.0"): 52.97, ("instruct", "Pythia-1.4B"): 17.74}


@pytest.mark.parametrize("suite", SUITES)
def test_the_scores_give_the_printed_averages_but_for_two_that_are_marked(suite: str) -> None:
    for row in PUBLISHED[suite]:
        assert len(row.scores) == len(SUITES[suite])
        if (suite, row.model) in WRONG_AVERAGES:
            assert row.misprint
            assert row.average == pytest.approx(WRONG_AVERAGES[suite, row.model], abs=0.0051)
        elif row.printed_average is not None:
            assert row.average == pytest.approx(row.printed_average, abs=0.0051), row.model


def test_every_suite_has_all_final_models_and_baselines() -> None:
    wanted = {"OPT-1.3B", "Pythia-1.0B", "Pythia-1.4B", "TinyLlama v1.0", "TinyLlama v1.1", "TinyLlama v1.1 Math&Code",
              "TinyLlama v1.1 Chinese"}  # fmt: skip
    for rows in PUBLISHED.values():
        assert wanted <= {row.model for row in rows}
        assert len({row.model for row in rows}) == len(rows)


def test_the_same_token_count_is_that_of_a_checkpoint_within_a_tenth() -> None:
    for suite, tokens, model in (
        ("commonsense", 500_000_000_000, "TinyLlama, 240k steps"),
        ("commonsense", 3_000_001_000_000, "TinyLlama v1.0"),
        ("instruct", 2_100_000_000_000, "TinyLlama, 955k steps"),
    ):
        row = nearest_checkpoint(suite, tokens)
        assert row is not None
        assert row.model == model
    assert nearest_checkpoint("commonsense", 1_000_000) is None
    assert nearest_checkpoint("commonsense", 750_000_000_000) is None
