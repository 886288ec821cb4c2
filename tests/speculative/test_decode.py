"""Assisted generation: the target's text in greedy decoding, its distribution in sampling, and counted rounds."""

import io
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import fast_folders
import pytest
import torch
from drafts import GREEDY, model, perturbed
from made_up import made_up_text

from tinyllama_ds.data.chat import Message
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.hf.chat import Conversation, chat_loop
from tinyllama_ds.hf.generate import Sampling
from tinyllama_ds.speculative.decode import alone, speculate
from tinyllama_ds.speculative.pair import make_pair
from tinyllama_ds.speculative.speed import SpeculativeAnswers

PROMPTS = [line for line in made_up_text(7, 2000).splitlines() if line.strip()][:100]


@pytest.fixture(params=["sentencepiece", "bpe"])
def kind(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path: Path) -> Tokenizer:
    return tokenizer if request.param == "sentencepiece" else load_tokenizer(fast_folders.smollm2(tmp_path, 400))


def test_greedy_text_is_the_targets(kind: Tokenizer) -> None:
    """100 prompts of each tokenizer; a draft whose tokens are nearly all rejected."""
    pair = make_pair(model(kind, 1), model(kind, 2, num_hidden_layers=1))
    sampling = replace(GREEDY, max_new_tokens=3)
    rounds = []
    for prompt in PROMPTS:
        ids = kind.encode(prompt)[:40]
        found = speculate(pair, ids, sampling, 2)
        assert found.ids == alone(pair.target.loaded, ids, sampling).ids, prompt
        rounds += found.rounds
    assert len(PROMPTS) == 100
    assert any(drafted == 2 for drafted, _ in rounds)
    assert sum(accepted for _, accepted in rounds) < 0.1 * sum(drafted for drafted, _ in rounds)


def test_every_token_of_a_copy_of_the_target_is_accepted(kind: Tokenizer) -> None:
    pair = make_pair(model(kind, 1), model(kind, 1))
    for prompt in PROMPTS[:8]:
        found = speculate(pair, kind.encode(prompt), GREEDY, 3)
        assert [tuple(round) for round in found.rounds] == [(3, 3), (3, 3), (3, 3)]
        assert len(found.ids) == 12


def test_rounds_are_those_of_the_tokens(tokenizer: Tokenizer) -> None:
    """A round gives its accepted tokens and one more."""
    target, draft = model(tokenizer, 1), perturbed(model(tokenizer, 1), 0.05)
    found = speculate(make_pair(target, draft), [5, 6, 7], replace(GREEDY, max_new_tokens=60), 4)
    assert sum(accepted + 1 for _, accepted in found.rounds) == len(found.ids) == 60
    assert len({accepted for _, accepted in found.rounds}) >= 3
    assert all(drafted == 4 for drafted, _ in found.rounds[:-4])


def test_a_drafted_eos_counts_as_accepted(tokenizer: Tokenizer) -> None:
    """`generate` ends with it, and passes on no token after it."""
    target, draft = model(tokenizer, 1), model(tokenizer, 1)
    third = alone(target.loaded, [5, 6, 7], GREEDY).ids[2]
    for each in (target, draft):
        each.loaded.model.generation_config.eos_token_id = third
    found = speculate(make_pair(target, draft), [5, 6, 7], GREEDY, 5)
    assert found.ids[-1] == third
    assert [tuple(round) for round in found.rounds] == [(len(found.ids), len(found.ids))]


def test_the_targets_cache_is_used(tokenizer: Tokenizer) -> None:
    """After the first round it reads only the drafted tokens and the one before."""
    target = model(tokenizer, 1)
    lengths: list[int] = []
    target.loaded.model.register_forward_pre_hook(
        lambda model, positional, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    drafted: list[int] = []
    draft = model(tokenizer, 2)
    draft.loaded.model.register_forward_pre_hook(
        lambda model, positional, named: drafted.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    speculate(make_pair(target, draft), list(range(5, 25)), replace(GREEDY, max_new_tokens=8), 3)
    assert lengths[0] == 23
    assert max(lengths[1:]) <= 4
    assert drafted[0] == 20
    assert max(drafted[1:]) <= 2


def test_sampling_has_the_distribution_of_the_target(tokenizer: Tokenizer) -> None:
    """The first token, which is a drafted one or what replaces it, against the probabilities of the target."""
    pair = make_pair(model(tokenizer, 1), perturbed(model(tokenizer, 1), 0.06))
    ids, draws = [5, 6, 7], 250
    expected, drafted = (probabilities(each.loaded.model, ids) for each in (pair.target, pair.draft))
    assert 0.3 < distance(expected, drafted) < 0.9
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=2, temperature=1.0, top_p=1.0, seed=0)
    found = [speculate(pair, ids, sampling, 1) for _ in range(draws)]
    counts = torch.bincount(torch.tensor([each.ids[0] for each in found]), minlength=len(expected))
    assert distance(expected, counts / draws) < 0.15
    accepted = sum(each.rounds[0].accepted for each in found) / draws
    assert accepted == pytest.approx(1 - distance(expected, drafted), abs=0.1)


def probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1].softmax(dim=-1)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """In total variation."""
    return (one - other).abs().sum().item() / 2


def test_beyond_the_positions_of_the_draft_the_target_goes_on_alone(tokenizer: Tokenizer) -> None:
    target, draft = model(tokenizer, 1), model(tokenizer, 1, max_position_embeddings=32)
    pair = make_pair(target, draft)
    for length, new in product((20, 31, 32, 50), (4, 40)):
        ids = [5 + number % 7 for number in range(length)]
        sampling = replace(GREEDY, max_new_tokens=new)
        found = speculate(pair, ids, sampling, 3)
        assert found.ids == alone(target.loaded, ids, sampling).ids
        assert len(found.ids) == new
        assert bool(sum(drafted for drafted, _ in found.rounds)) == (length < 31)


def test_a_conversation_has_the_answers_of_the_target(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    target, draft = model(tokenizer, 1), model(tokenizer, 2, num_hidden_layers=1)

    def encode_chat(messages: list[Message]) -> list[int]:
        return tokenizer.encode(" ".join(message.content for message in messages))[-40:]

    loaded = replace(target.loaded, encode_chat=encode_chat)
    answers = SpeculativeAnswers(make_pair(replace(target, loaded=loaded), draft), 3)
    texts = []
    for others in ((), (answers,)):
        monkeypatch.setattr("sys.stdin", io.StringIO("the loss\nthe rate\n"))
        chat_loop(Conversation(loaded, GREEDY, None, *others), answers.report_answer)
        texts.append(capsys.readouterr())
    assert texts[0].out == texts[1].out
    assert texts[0].err == ""
    lines = texts[1].err.splitlines()
    assert len(lines) == 2
    assert " of 3 drafted tokens accepted per round, " in lines[0]
    answers.report_end()
    assert "; the target alone: " in capsys.readouterr().err
