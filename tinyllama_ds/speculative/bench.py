"""`tinyllama-ds draft-bench`: drafts of several lengths and the target alone, on the same prompts, in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.generate import Sampling, prompt_tokens
from tinyllama_ds.inputs import read_text
from tinyllama_ds.speculative import acceptance as formulas
from tinyllama_ds.speculative.decode import Generation, alone, speculate
from tinyllama_ds.speculative.pair import NamedModel, Pair

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Setting:
    """What generates: the target alone, a draft alone (whose speed gives its cost), or both."""

    pair: Pair | None = None
    draft_length: int = 0

    @property
    def is_speculative(self) -> bool:
        return self.draft_length > 0


def read_prompts(path: Path, target: NamedModel) -> list[str]:
    """The prompts of a text file, one a line. Raises `ConfigError` where there is none, or one does not fit."""
    lines = enumerate(read_text(path, "the file of prompts").splitlines(), start=1)
    prompts = [(number, line) for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: has no prompts; expected one a line")
    for number, line in prompts:
        if (length := len(prompt_tokens(target.loaded, line))) >= target.loaded.positions:
            raise ConfigError(
                f"{path}:{number}: the prompt has {length} tokens; expected fewer than the {target.loaded.positions}"
                f" positions of {target.name}"
            )
    return [line for _, line in prompts]


class Bench:
    """Measures all settings on one prompt after the other, so that what slows the machine slows all of them."""

    def __init__(self, target: NamedModel, pairs: Sequence[Pair], draft_lengths: Sequence[int], sampling: Sampling):
        self.target = target
        self.pairs = pairs
        self.draft_lengths = sorted(set(draft_lengths))
        self.sampling = sampling
        both = [Setting(pair, length) for pair in pairs for length in self.draft_lengths]
        self.settings = [Setting(), *(Setting(pair) for pair in pairs), *both]
        self.runs: list[list[Generation]] = [[] for _ in self.settings]  # (settings, prompts)

    def measure(self, prompts: Sequence[str]) -> Iterator[None]:
        """Yields after every generation; the first prompt warms up all settings before."""
        short = replace(self.sampling, max_new_tokens=min(_WARM_UP_TOKENS, self.sampling.max_new_tokens))
        for setting in self.settings:
            self._generate(setting, prompts[0], short)
            yield
        for number, prompt in enumerate(prompts):
            for place in range(len(self.settings)):
                turn = (place + number) % len(self.settings)  # no setting always follows the same one
                self.runs[turn].append(self._generate(self.settings[turn], prompt, self.sampling))
                yield

    def _generate(self, setting: Setting, prompt: str, sampling: Sampling) -> Generation:
        torch.manual_seed(sampling.seed)
        if setting.pair is None:
            return alone(self.target.loaded, prompt_tokens(self.target.loaded, prompt), sampling)
        if setting.is_speculative:
            ids = prompt_tokens(self.target.loaded, prompt)
            return speculate(setting.pair, ids, sampling, setting.draft_length)
        draft = setting.pair.draft.loaded
        ids = prompt_tokens(draft, prompt)[-max(1, draft.positions - sampling.max_new_tokens) :]
        return alone(draft, ids, sampling, to_the_end=True)

    def result(self) -> dict[str, Any]:
        """All figures, as `--json` prints them."""
        model = self.target.loaded.model
        return {
            "target": self.target.name,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "prompts": len(self.runs[0]),
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "parameters": self.target.parameters,
            "tokens": _tokens(self.runs[0]),
            "tokens_per_second": _rate(self.runs[0]),
            "drafts": [self._draft(pair) for pair in self.pairs],
        }

    def _draft(self, pair: Pair) -> dict[str, Any]:
        own = self.runs[self.settings.index(Setting(pair))]
        cost_ratio = _rate(self.runs[0]) / _rate(own)
        rows = [self._row(Setting(pair, length), cost_ratio) for length in self.draft_lengths]
        longest = self.runs[self.settings.index(Setting(pair, self.draft_lengths[-1]))]
        best = max(rows, key=lambda row: row["speedup"])
        return {
            "draft": pair.draft.name,
            "parameters": pair.draft.parameters,
            "tokens_per_second": _rate(own),
            "cost_ratio": cost_ratio,
            "acceptance_by_position": formulas.acceptance_by_position(_rounds(longest)),
            "best_draft_length": best["draft_length"],
            "speedup": best["speedup"],
            "draft_lengths": rows,
        }

    def _row(self, setting: Setting, cost_ratio: float) -> dict[str, Any]:
        runs, length = self.runs[self.settings.index(setting)], setting.draft_length
        rounds = _rounds(runs)
        share = formulas.acceptance(rounds)
        drafting = sum(round.drafted > 0 for round in rounds)
        in_tokens = sum(run.seconds for run in runs) * _rate(self.runs[0])  # of the target alone
        round_cost = (in_tokens - (len(rounds) - drafting)) / max(1, drafting)  # without a draft a round is one
        is_same = [run.ids == expected.ids for run, expected in zip(runs, self.runs[0], strict=True)]
        return {
            "draft_length": length,
            "acceptance": share,
            "accepted_per_round": formulas.accepted_per_round(rounds),
            "tokens_per_second": _rate(runs),
            "speedup": _rate(runs) / _rate(self.runs[0]),
            "predicted_speedup": formulas.predicted_speedup(share, length, cost_ratio),
            "round_cost": round_cost,
            "acceptance_to_break_even": formulas.acceptance_for(1.0, length, round_cost),
            "same_as_target": sum(is_same) if self.sampling.temperature == 0 else None,
        }


def _rounds(runs: Sequence[Generation]) -> list:
    return list(chain.from_iterable(run.rounds for run in runs))


def _tokens(runs: Sequence[Generation]) -> int:
    return sum(len(run.ids) for run in runs)


def _rate(runs: Sequence[Generation]) -> float:
    return _tokens(runs) / sum(run.seconds for run in runs)
