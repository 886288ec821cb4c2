"""What fits one small card, as in docs/planning.md: states in bf16, offloading, recomputation."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import tinyllama_ds

ROOT = Path(__file__).parents[2]
CARDS = (8, 12, 16, 24)  # GiB
# recipe, file, recomputed: GiB at the peak
NEEDS = {
    ("tinyllama-v1", "zero2_bf16_states", 0): 15.5,
    ("tinyllama-v1", "zero2_bf16_states", 1): 13.8,
    ("tinyllama-v1", "zero3_offload", 0): 19.3,
    ("tinyllama-v1", "zero3_offload", 1): 11.8,
    ("tinyllama-120m", "zero2_bf16_states", 0): 3.5,
    ("tinyllama-120m", "zero2_bf16_states", 1): 3.0,
    ("tinyllama-120m", "zero2", 0): 8.6,
    ("tinyllama-120m", "zero2", 1): 4.7,
}


def _cards() -> Iterator[tuple[str, str, int, int]]:
    """The smallest card that fits, and the one below it."""
    for case, needs in NEEDS.items():
        fitting = [card for card in CARDS if card >= needs]
        below = [card for card in CARDS if card < needs]
        yield from ((*case, card) for card in (*fitting[:1], *below[-1:]))


@pytest.mark.parametrize(("recipe", "file", "recomputed", "card"), _cards())
def test_what_fits(recipe: str, file: str, recomputed: int, card: int) -> None:
    config = ROOT / "ds_configs" / f"{file}.json"
    finished = tinyllama_ds(
        "plan", "--recipe", recipe, "--deepspeed-config", config, "--num-gpus", 1, "--gpu-memory", f"{card}GiB",
        "--peak-tflops", 100, "--activation-checkpointing", recomputed,
    )  # fmt: skip
    needs = NEEDS[recipe, file, recomputed]
    if needs > card:
        assert finished.returncode == 78
        return
    assert finished.returncode == 0, finished.stderr
    found = re.search(r"fits \(([\d.]+) of", finished.stdout)
    assert found is not None
    assert float(found[1]) == needs


def test_the_docs_have_the_same_numbers() -> None:
    page = (ROOT / "docs" / "planning.md").read_text()
    for recipe, file in {(recipe, file) for recipe, file, _ in NEEDS}:
        whole, recomputed = NEEDS[recipe, file, 0], NEEDS[recipe, file, 1]
        assert re.search(rf"\| {recipe} \| `{file}.json`[^|]*\| {whole} \| {recomputed} \|", page)
