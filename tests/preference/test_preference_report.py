"""The table and the picture of a preference tuning."""

import pytest

from tinyllama_ds.preference.report import picture_of, split_history, summary, table

HISTORY = [
    *({"step": step, "loss": 1 / step, "rewards/margins": step, "rewards/accuracies": 0.5} for step in range(1, 21)),
    {"step": 20, "eval_loss": 0.25, "eval_rewards/margins": 3.0, "eval_rewards/accuracies": 0.75},
    {"step": 20, "train_loss": 0.3, "train_runtime": 1.0},
]


def test_the_summary_is_of_the_first_and_the_last_tenth() -> None:
    found = summary(HISTORY)
    assert found["first steps"] == pytest.approx({"loss": 0.75, "margin": 1.5, "accuracy": 0.5})
    assert found["last steps"] == pytest.approx({"loss": (1 / 19 + 1 / 20) / 2, "margin": 19.5, "accuracy": 0.5})
    assert found["validation"] == {"loss": 0.25, "margin": 3.0, "accuracy": 0.75}
    assert table(found).splitlines()[-1].split() == ["validation", "0.2500", "3.0000", "0.7500"]


def test_without_validation() -> None:
    assert list(summary(HISTORY[:20])) == ["first steps", "last steps"]


def test_the_picture_has_both_curves() -> None:
    axes = picture_of(HISTORY, "title").axes
    assert [axis.get_title() for axis in axes] == ["loss", "margin", "accuracy"]
    assert [line.get_label() for line in axes[1].lines] == ["training", "validation"]
    assert len(axes[1].lines[0].get_xdata()) == len(split_history(HISTORY)[0]) == 20
