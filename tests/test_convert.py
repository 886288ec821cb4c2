"""The Hugging Face folder: the tokenizer gives sentencepiece's ids, and a wrong folder is refused."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from tinyllama_ds import convert
from tinyllama_ds.convert import PROBE_TEXTS, export, hf_tokenizer
from tinyllama_ds.data.encoding import ranked_merges
from tinyllama_ds.data.tokenizer import Tokenizer
from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.model.probe import Probe, probe_loss

CONFIG = MODEL_SIZES["test"]
LLAMA2 = Path(
    os.environ.get("TINYLLAMA_DS_LLAMA2_TOKENIZER", "")
    or Path(__file__).parents[2] / "shared" / "data" / "llama2-tokenizer" / "tokenizer.model"
)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in build_model(CONFIG, "eager", seed=1).state_dict().items()}


def python_sources() -> list[str]:
    return [path.read_text() for path in sorted(Path(convert.__file__).parent.rglob("*.py"))]


def test_token_ids_equal_sentencepiece(tokenizer: Tokenizer, tmp_path: Path) -> None:
    hf_tokenizer(tokenizer, 128).save_pretrained(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*PROBE_TEXTS, *python_sources()]:
        assert fast.encode(text, split_special_tokens=True) == tokenizer.encode(text), text[:80]
        assert fast.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.skipif(
    not LLAMA2.is_file(), reason="Llama 2's tokenizer.model is not here (TINYLLAMA_DS_LLAMA2_TOKENIZER)"
)
def test_token_ids_equal_sentencepiece_with_llamas_own_vocabulary() -> None:
    """Runs of spaces are where transformers' own conversion differs."""
    tokenizer = Tokenizer(LLAMA2)
    fast = hf_tokenizer(tokenizer, 2048)
    for text in [*PROBE_TEXTS, *python_sources()]:
        assert fast.encode(text, split_special_tokens=True) == tokenizer.encode(text), text[:80]


def test_exported_weights_are_the_same_bits(tokenizer: Tokenizer, weights: dict, tmp_path: Path) -> None:
    assert export(weights, CONFIG, tokenizer, tmp_path / "hf") < convert.LOGIT_TOLERANCE
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "hf").iterdir())


def test_logits_that_differ_are_refused_and_leave_nothing(
    tokenizer: Tokenizer, weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the conversion itself: two projections swapped on their way out."""
    real = convert.hf_model

    def swapped(weights: dict, config: object) -> object:
        layer = "model.layers.0.mlp"
        names = f"{layer}.gate_proj.weight", f"{layer}.up_proj.weight"
        return real(weights | {names[0]: weights[names[1]], names[1]: weights[names[0]]}, config)

    monkeypatch.setattr(convert, "hf_model", swapped)
    with pytest.raises(Refusal, match="logits differ from ours"):
        export(weights, CONFIG, tokenizer, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_token_ids_that_differ_are_refused(
    tokenizer: Tokenizer, weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the tokenizer's conversion: merges in the opposite order."""
    monkeypatch.setattr(convert, "ranked_merges", lambda tokenizer: ranked_merges(tokenizer)[::-1])
    with pytest.raises(Refusal, match="token ids of .* differ from sentencepiece's"):
        export(weights, CONFIG, tokenizer, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_folder_must_give_the_loss_that_training_had(
    document_mask: bool, tokenizer: Tokenizer, weights: dict, tmp_path: Path
) -> None:
    """The probe of a checkpoint, computed in bf16 as training does; then one whose weights had another loss."""
    model = build_model(CONFIG, "sdpa", seed=1).bfloat16()
    model.load_state_dict(weights)
    tokens = tokenizer.encode(" ".join(PROBE_TEXTS))[:65]
    segments = [number // 20 for number in range(64)] if document_mask else None
    loss = probe_loss(model, tokens, segments, 2, torch.device("cpu"))
    probe = Probe(tokens, segments, loss, "bfloat16", {})
    export(weights, CONFIG, tokenizer, tmp_path / "hf", probe)
    with pytest.raises(Refusal, match=r"the loss on the checkpoint's probe is \d\.\d+ and was .* in training"):
        export(weights, CONFIG, tokenizer, tmp_path / "other", replace(probe, loss=1.01 * loss))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
