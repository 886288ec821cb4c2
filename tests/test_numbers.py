"""Large numbers and durations as people read them."""

import pytest

from tinyllama_ds.numbers import duration, short_count


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (512, "512"), (32_768, "32.77k"), (6e9, "6B"), (350e9, "350B"), (1.5e12, "1.5T"), (2_097_152, "2.097M")],
)
def test_a_count_in_short(count: float, text: str) -> None:
    assert short_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.2, "0 s"), (59.6, "1 min"), (3725, "1 h 2 min"), (8e6, "92 d 14 h")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
