"""Exported GGUF files in llama.cpp (`--real`): our ids, our probabilities, and the greedy text of a trained model."""

import math
from dataclasses import replace
from pathlib import Path

import fast_folders
import pytest
import torch
from llama_server import Ask, llama_cpp, serving
from smollm import write_smollm2

from tinyllama_ds.commands.trained.stored import open_stored
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.vocabulary import PROBE_TEXTS, probe_texts
from tinyllama_ds.hf.generate import LoadedModel, Sampling, continue_ids, load_from_weights
from tinyllama_ds.hf.gguf.comparison import SampleText
from tinyllama_ds.hf.gguf.export import GgufModel, export_gguf
from tinyllama_ds.hf.import_model import import_hf_folder
from tinyllama_ds.model.config import MODEL_SIZES, Llama3Scaling, LlamaConfig, YarnScaling
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model

pytestmark = pytest.mark.real
TEST = MODEL_SIZES["test"]
CONFIGS = {
    "plain": TEST,
    "tied, of another head size": replace(TEST, tie_word_embeddings=True, head_dim=32),
    "linear": replace(TEST, rope_scaling_factor=4.0),
    "llama3": replace(TEST, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32)),
    "yarn": replace(TEST, rope_scaling=YarnScaling(4.0, 32)),
    "yarn, of another factor": replace(TEST, rope_scaling=YarnScaling(4.0, 32, attention_factor=1.5)),
}
PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "The three primary colours are",
    "Water boils at", "import numpy as np\n", "My favourite food is", "The first president of the United States",
    "A llama is an animal that", "In 1969,", "To bake bread, you need", "The Pacific Ocean",
    "Photosynthesis is", "\"Hello,\" she said,", "List of planets:\n1. Mercury\n2.", "Machine learning is",
    "The opposite of hot is", "for (int i = 0;", "Shakespeare wrote", "There are seven days in",
]  # fmt: skip
TOKENS = 24


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return llama_cpp(tmp_path_factory.mktemp("llama_cpp"))


def exported(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    text = SampleText("numbers", [torch.arange(65)])
    export_gguf(GgufModel("test", model.config, weights, tokenizer), "f16", output, text)


def trained(config: LlamaConfig) -> LlamaForCausalLM:
    """Weights that are exact in f16, large enough that positions matter."""
    model = build_model(config, "eager", seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            parameter.copy_(parameter.half())
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_it_has_our_probabilities(case: str, command: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """After 100 tokens, beyond the positions that the rotation was scaled from."""
    model = trained(CONFIGS[case])
    exported(model, tokenizer, tmp_path / "m.gguf")
    ids = torch.randint(3, 500, (100,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids[None])[0, -1].log_softmax(dim=-1)
    question = {"prompt": ids.tolist(), "n_predict": 1, "n_probs": 20, "temperature": 1.0}
    with serving(command, tmp_path / "m.gguf", 128) as ask:
        [found] = ask("/completion", question)["completion_probabilities"]
    top = {entry["id"]: entry["logprob"] for entry in found["top_logprobs"]}
    assert len(top) == 20
    assert list(top.values()) == pytest.approx([expected[token].item() for token in top], abs=0.01)
    assert max(top.values()) == pytest.approx(expected.max().item(), abs=0.01)


def differing(ask: Ask, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts of which llama.cpp has other ids, but for those with a NUL, which end a text in C."""
    how = {"add_special": True, "parse_special": False}
    return [
        text
        for text in texts
        if "\0" not in text and ask("/tokenize", {"content": text, **how})["tokens"] != tokenizer.encode(text)
    ]


@pytest.mark.parametrize("kind", ["sentencepiece", "smollm2", "llama_3"])
def test_it_has_our_ids(kind: str, command: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of texts with every piece of the vocabulary."""
    if kind != "sentencepiece":
        tokenizer = load_tokenizer(getattr(fast_folders, kind)(tmp_path / "tokenizer"))
    exported(trained(replace(TEST, vocab_size=tokenizer.vocab_size)), tokenizer, tmp_path / "m.gguf")
    with serving(command, tmp_path / "m.gguf", 128) as ask:
        assert differing(ask, tokenizer, probe_texts(tokenizer)) == []


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a model folder of ours."""
    root = tmp_path_factory.mktemp("smollm2")
    (root / "packages").mkdir()
    import_hf_folder(write_smollm2(root / "hf", root / "packages"), root / "ours")
    return root / "ours"


def ours(loaded: LoadedModel, prompt: str) -> str:
    ids = continue_ids(loaded, loaded.encode(prompt), Sampling(TOKENS, 0.0, 1.0, 0))
    return loaded.decode([token for token in ids if token != loaded.eos_id])


def test_a_trained_model_has_our_ids_and_greedy_text(smollm2: Path, command: list[str], tmp_path: Path) -> None:
    stored = open_stored(smollm2)
    weights = dict(stored.tensors)
    text = SampleText("numbers", [torch.arange(65)])
    model = GgufModel("smollm2", stored.config, weights, stored.tokenizer)
    export_gguf(model, "f16", tmp_path / "m.gguf", text)
    loaded = load_from_weights(weights, stored.config, stored.tokenizer)
    with serving(command, tmp_path / "m.gguf") as ask:
        assert differing(ask, stored.tokenizer, [*PROBE_TEXTS, *PROMPTS]) == []
        question = {"n_predict": TOKENS, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
        for prompt in PROMPTS:
            found = ask("/completion", question | {"prompt": prompt})["content"]
            assert found == ours(loaded, prompt), prompt


@pytest.mark.parametrize(("quantization", "most"), [("q8_0", 0.002), ("q4_0", math.inf)])
def test_what_quantisation_costs(quantization: str, most: float, smollm2: Path, tmp_path: Path) -> None:
    """Of the perplexity on Python's reference, to three standard errors of the difference."""
    from tinyllama_ds.hf.gguf.comparison import sample_text

    stored = open_stored(smollm2)
    model = GgufModel("smollm2", stored.config, dict(stored.tensors), stored.tokenizer)
    text = sample_text(None, stored.tokenizer, stored.config)
    found = export_gguf(model, quantization, tmp_path / "m.gguf", text).comparison
    print(quantization, found)
    assert abs(found.perplexity_change) <= most + 3 * found.loss_error
