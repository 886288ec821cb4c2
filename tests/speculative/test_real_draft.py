"""SmolLM2-135M as the target, and some of its own layers as the draft (`--real`)."""

import json
from dataclasses import replace
from itertools import product
from math import floor, log2
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from smollm import CONFIG, write_smollm2

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.hf.convert import export
from tinyllama_ds.hf.generate import Sampling, load_from_hf_folder, prompt_tokens
from tinyllama_ds.speculative.decode import alone, speculate
from tinyllama_ds.speculative.pair import NamedModel, make_pair

pytestmark = pytest.mark.real
PROMPTS = Path(__file__).parents[2] / "benchmarks" / "draft_prompts.txt"
KEPT = [number for number in range(30) if number not in (15, 20)]  # which still agrees on 60 % of the tokens


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smollm2")
    (root / "packages").mkdir()
    return write_smollm2(root / "target", root / "packages")


@pytest.fixture(scope="module")
def draft(target: Path) -> Path:
    kept = {f".layers.{number}.": f".layers.{place}." for place, number in enumerate(KEPT)}
    tensors = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        layer = next((old for old in kept if old in name), None)
        if layer or ".layers." not in name:
            tensors[name.replace(layer, kept[layer]) if layer else name] = tensor
    folder = target.with_name("draft")
    shape = replace(CONFIG, num_hidden_layers=len(kept))
    export(tensors.items(), shape, load_tokenizer(target / "tokenizer.json"), folder)
    return folder


def test_greedy_text_of_200_prompts_is_the_targets(target: Path, draft: Path) -> None:
    pair = make_pair(*(NamedModel(str(path), load_from_hf_folder(path)) for path in (target, draft)))
    prompts = PROMPTS.read_text().splitlines()
    sampling = Sampling(max_new_tokens=8, temperature=0.0, top_p=1.0, seed=0)
    rounds = []
    for first, second in list(product(prompts, prompts))[::2][:200]:
        ids = prompt_tokens(pair.target.loaded, f"{first} {second}")
        found = speculate(pair, ids, sampling, 4)
        assert found.ids == alone(pair.target.loaded, ids, sampling).ids, (first, second)
        rounds += found.rounds
    accepted, drafted = (sum(each) for each in zip(*((one.accepted, one.drafted) for one in rounds), strict=True))
    print(f"{accepted} of {drafted} drafted tokens accepted")
    assert 0.1 < accepted / drafted < 0.9


def test_in_bf16_texts_differ_where_the_two_likeliest_logits_are_a_unit_apart(target: Path, draft: Path) -> None:
    """Several tokens at once are rounded differently from one at a time, and one unit decides between these two."""
    models = [load_from_hf_folder(path) for path in (target, draft)]
    for loaded in models:
        loaded.model.to(torch.bfloat16)
    pair = make_pair(*(NamedModel(name, loaded) for name, loaded in zip(("target", "draft"), models, strict=True)))
    exact = load_from_hf_folder(target).model.float()
    sampling = Sampling(max_new_tokens=32, temperature=0.0, top_p=1.0, seed=0)
    gaps = []
    for prompt in PROMPTS.read_text().splitlines()[:12]:
        ids = prompt_tokens(pair.target.loaded, prompt)
        one, other = alone(pair.target.loaded, ids, sampling).ids, speculate(pair, ids, sampling, 3).ids
        if one != other:
            same = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            with torch.no_grad():
                first, second = exact(torch.tensor([[*ids, *one[:same]]])).logits[0, -1].topk(2).values.tolist()
            gaps.append((first - second) / 2 ** (floor(log2(first)) - 7))  # bf16 has 8 bits
    print(f"{len(gaps)} of 12 texts differ, gaps in units of the last place: {[round(gap, 2) for gap in gaps]}")
    assert gaps
    assert max(gaps) < 1.5


def test_all_figures_are_measured(target: Path, draft: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("\n".join(PROMPTS.read_text().splitlines()[:4]))
    arguments = ["--target", target, "--drafts", draft, "--prompts", tmp_path / "prompts", "--output", tmp_path]
    more = ["--max-new-tokens", 16, "--draft-lengths", 1, 3]
    assert main(["draft-bench", *map(str, arguments), *map(str, more)]) == 0
    (found,) = json.loads((tmp_path / "draft_bench.json").read_text())["drafts"]
    print(found)
    assert 0.3 < found["cost_ratio"] < 2
    assert all(row["same_as_target"] == 4 for row in found["draft_lengths"])
    assert found["draft_lengths"][1]["accepted_per_round"] > 0.2
