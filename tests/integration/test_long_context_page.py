"""The first commands of docs/long-context.md as they stand, at toy size, one after another (`--real`)."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from forked import pretrain, tinyllama_ds
from hf_folders import write_hf_folder
from launching import write_deepspeed_config
from made_up import made_up_text
from test_docs import commands_of

from tinyllama_ds.config.recipe import RECIPE_DIRECTORY
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.hf.import_model import import_hf_folder
from tinyllama_ds.model.config import MODEL_SIZES

PAGE = Path(__file__).parents[2] / "docs" / "long-context.md"
SHORTER = 256  # times than the page's contexts: 128 and 512 tokens from 8
META = {"redpajama_set_name": "RedPajamaC4"}


def write_toy(name: str, path: Path) -> None:
    """The recipe with its rope, packing and mixture, six steps of eight sequences, and contexts that are shorter."""
    text = (RECIPE_DIRECTORY / f"{name}.toml").read_text()
    length = int(re.search(r"^sequence_length = ([\d_]+)", text, flags=re.M)[1].replace("_", "")) // SHORTER
    sizes = {"sequence_length": length, "global_batch_tokens": 8 * length, "validation_samples": 2}
    sizes |= dict.fromkeys(("tokens", "evaluate_tokens", "save_tokens"), 48 * length)
    for key, value in sizes.items():
        text = re.sub(rf"^{key} = [\d_]+", f"{key} = {value}", text, flags=re.M)
    toy, model = MODEL_SIZES["test"], MODEL_SIZES[re.search('^model = "(.*)"', text, flags=re.M)[1]]
    table = {key: getattr(toy, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    table |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": toy.rms_norm_eps}
    table |= {"max_position_embeddings": length, "rope_theta": model.rope_theta}
    lines = [f"{key} = {value}" for key, value in table.items()]
    if model.rope_scaling:
        lines.append(
            f'rope_scaling = {{ rope_type = "yarn", factor = 4, original_max_position_embeddings = {length // 4} }}'
        )
    text = re.sub(r"^model = .*\n", "", text, flags=re.M)
    path.write_text(text.replace("[[stages]]", "\n".join(["[model]", *lines, "", "[[stages]]"]), 1))


@pytest.fixture
def workplace(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader of the page stands: raw corpora, a tokenizer, an imported model of 8 positions."""
    places = (
        "SlimPajama-627B/train/chunk1",
        "SlimPajama-627B/validation",
        "starcoderdata/python",
        "starcoderdata/java",
    )
    for number, place in enumerate(places):
        (tmp_path / place).mkdir(parents=True)
        texts = [made_up_text(1000 * number + index, 5 + index * 4) for index in range(80)]
        lines = [json.dumps({"text": text, "content": text, "meta": META}) for text in texts]
        (tmp_path / place / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "part").mkdir()
    for split, target in (("train", "train/chunk1"), ("validation", "validation")):
        (tmp_path / "part" / split).symlink_to(tmp_path / "SlimPajama-627B" / target)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    write_hf_folder(tmp_path / "hf", replace(MODEL_SIZES["test"], max_position_embeddings=8), tokenizer)
    import_hf_folder(tmp_path / "hf", tmp_path / "tinyllama")
    for name in ("tinyllama-32k", "tinyllama-128k"):
        write_toy(name, tmp_path / f"{name}.toml")
    write_deepspeed_config(tmp_path / "zero1_long.json", 1, micro_batch=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_small(word: str) -> str:
    """A word of a command of the page, for the toys."""
    files = {"tinyllama-32k": "tinyllama-32k.toml", "tinyllama-128k": "tinyllama-128k.toml"}
    return (files | {"zero1_long": "zero1_long.json", "32768": "128"}).get(word, word)


@pytest.mark.real
def test_the_commands_of_the_page_work(workplace: Path) -> None:
    starts = []
    beginning = workplace / PAGE.name
    beginning.write_text(PAGE.read_text().partition("\n## ")[0])
    for command in commands_of(beginning):
        words = list(map(in_small, command[1:]))
        if words[0] == "pretrain":
            named = {name: Path(value) for name, value in pairwise(words) if name.startswith("--")}
            paths = (named[f"--{key}"] for key in ("recipe", "deepspeed-config", "data", "run-dir"))
            finished = pretrain(*paths, 2, *words[words.index("--init-from") :])
        else:
            finished = tinyllama_ds(*words)
        assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
        starts += re.findall(r"^started from .*", finished.stdout, flags=re.M)
    assert starts[0].endswith(": rope_theta 10000 -> 1000000, max_position_embeddings 8 -> 128")
    assert starts[1].endswith(": rope_scaling none -> yarn x4, max_position_embeddings 128 -> 512")
    config = json.loads((workplace / "tinyllama-128k-hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
