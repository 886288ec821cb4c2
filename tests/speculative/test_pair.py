"""Which models may be target and draft: tokenizers, padded vocabularies, sizes and positions."""

from dataclasses import replace
from pathlib import Path

import fast_folders
import pytest
import torch
from drafts import GREEDY, SHAPE, model

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.convert import export
from tinyllama_ds.hf.generate import load_from_hf_folder
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.speculative.decode import alone, speculate
from tinyllama_ds.speculative.pair import NamedModel, make_pair


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(fast_folders.smollm2(tmp_path_factory.mktemp("bpe"), 400))


@pytest.fixture(scope="module")
def other_bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With fewer pieces, whose ids are the same, as they are the first merges."""
    return load_tokenizer(fast_folders.smollm2(tmp_path_factory.mktemp("other"), 350))


def test_different_tokenizers_are_rejected_in_one_sentence(
    tokenizer: Tokenizer, bpe: Tokenizer, other_bpe: Tokenizer
) -> None:
    target = model(tokenizer, 1, "TARGET")
    with pytest.raises(ConfigError, match=r"^DRAFT: id 0 is '<\|endoftext\|>' in its tokenizer and '<unk>' in that of"):
        make_pair(target, model(bpe, 2, "DRAFT"))
    named = r"DRAFT: id 350 is unused in its tokenizer and '.*' in that of TARGET; expected a draft with the target's"
    with pytest.raises(ConfigError, match=named):
        make_pair(model(bpe, 1, "TARGET"), model(other_bpe, 2, "DRAFT"))


def test_a_run_and_an_exported_folder_have_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(build_model(SHAPE, "eager", seed=1).state_dict().items(), SHAPE, tokenizer, tmp_path / "hf")
    pair = make_pair(NamedModel("hf", load_from_hf_folder(tmp_path / "hf")), model(tokenizer, 2))
    assert pair.options.keys() == {"assistant_model"}


def test_a_token_added_to_one_of_them_is_no_difference(tokenizer: Tokenizer) -> None:
    target = model(tokenizer, 1, vocab_size=520)
    extended = target.loaded.hf_tokenizer()
    extended.add_special_tokens({"pad_token": "<pad>"})
    loaded = replace(target.loaded, hf_tokenizer=lambda: extended)
    assert make_pair(NamedModel("target", loaded), model(tokenizer, 2))
    conflicting = target.loaded.hf_tokenizer()
    conflicting.add_special_tokens({"pad_token": "<other>"})
    with pytest.raises(ConfigError, match="id 512 is '<other>' in its tokenizer and '<pad>' in that of target"):
        make_pair(
            NamedModel("target", loaded),
            NamedModel("draft", replace(model(tokenizer, 2).loaded, hf_tokenizer=lambda: conflicting)),
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(("target_rows", "draft_rows"), [(512, 576), (576, 512), (576, 544)])
def test_vocabularies_of_different_padding_fit(
    target_rows: int, draft_rows: int, is_tied: bool, temperature: float, tokenizer: Tokenizer
) -> None:
    """The draft is the same model but for the rows of its padding."""
    target = model(tokenizer, 1, vocab_size=target_rows, tie_word_embeddings=is_tied)
    draft = model(tokenizer, 1, vocab_size=draft_rows, tie_word_embeddings=is_tied)
    rows = min(target_rows, draft_rows)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        theirs, ours = (getattr(each.loaded.model, name)().weight.data for each in (target, draft))
        ours[:rows] = theirs[:rows]
        ours[rows:] = theirs[rows:] = 0
    for theirs, ours in zip(target.loaded.model.model.parameters(), draft.loaded.model.model.parameters(), strict=True):
        if theirs.shape == ours.shape:
            ours.data.copy_(theirs.data)
    pair = make_pair(target, draft)
    sampling = replace(GREEDY, temperature=temperature)
    found = speculate(pair, [5, 6, 7], sampling, 3)
    assert all(accepted == drafted for drafted, accepted in found.rounds) or temperature
    assert sum(drafted for drafted, _ in found.rounds) >= 2
    if not temperature:
        assert found.ids == alone(target.loaded, [5, 6, 7], GREEDY).ids


def test_padded_rows_of_a_draft_are_never_drafted(tokenizer: Tokenizer) -> None:
    target, draft = model(tokenizer, 1, vocab_size=576), model(tokenizer, 2)
    make_pair(target, draft)
    logits = draft.loaded.model(torch.tensor([[1, 2, 570]])).logits
    assert logits.shape[-1] == 576
    assert logits[..., 512:].isinf().all()
    assert logits[..., :512].isfinite().all()


def test_a_draft_that_cannot_help_is_reported(tokenizer: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    make_pair(
        model(tokenizer, 1, "TARGET"), model(tokenizer, 2, "DRAFT", num_hidden_layers=3, max_position_embeddings=64)
    )
    larger, shorter = capsys.readouterr().err.splitlines()
    assert larger.startswith("tinyllama-ds: DRAFT: the draft has 204.2k parameters, TARGET has 158k; ")
    positions = "the draft has 64 positions, TARGET has 128; beyond the draft's the target generates alone"
    assert shorter == f"tinyllama-ds: DRAFT: {positions}"


@pytest.mark.parametrize("rows", [512, 544])
def test_universal_assisted_decoding_has_the_text_of_the_target(
    rows: int, tokenizer: Tokenizer, bpe: Tokenizer
) -> None:
    """Asked for by name; transformers takes vocabularies of the same size for the same tokenizer, and these are not."""
    target, draft = model(tokenizer, 1), model(bpe, 2, vocab_size=rows)
    pair = make_pair(target, draft, is_universal=True)
    assert pair.options.keys() == {"assistant_model", "tokenizer", "assistant_tokenizer"}
    ids = target.loaded.encode("the small llama reads")
    assert speculate(pair, ids, GREEDY, 3).ids == alone(target.loaded, ids, GREEDY).ids
    torch.manual_seed(0)
    assert speculate(pair, ids, replace(GREEDY, temperature=1.0), 3).ids
