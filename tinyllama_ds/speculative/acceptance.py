"""What the rounds of a draft mean: acceptance, by position, and the speed-up that follows from it.

Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding", Theorem 3.8: if each drafted token
is accepted with probability a, a round of g drafted tokens gives (1 - a^(g+1)) / (1 - a) tokens on average, and takes
the time of g c + 1 forwards of the target, where c is the cost ratio: the draft's time for a token over the target's.
"""

from collections.abc import Sequence

from tinyllama_ds.speculative.decode import Round


def acceptance_by_position(rounds: Sequence[Round]) -> list[float]:
    """How often the k-th drafted token was accepted, in the rounds in which those before it were (drafted,)."""
    longest = max((round.drafted for round in rounds), default=0)
    shares = []
    for position in range(longest):
        tried = [round for round in rounds if round.drafted > position and round.accepted >= position]
        if not tried:
            break
        shares.append(sum(round.accepted > position for round in tried) / len(tried))
    return shares


def acceptance(rounds: Sequence[Round]) -> float:
    """The share of accepted tokens among those that were accepted or rejected; what follows a rejection is neither."""
    accepted = sum(round.accepted for round in rounds)
    rejected = sum(round.accepted < round.drafted for round in rounds)
    return accepted / max(1, accepted + rejected)


def accepted_per_round(rounds: Sequence[Round]) -> float:
    """The mean over the rounds with drafted tokens."""
    drafting = [round.accepted for round in rounds if round.drafted]
    return sum(drafting) / max(1, len(drafting))


def tokens_per_round(acceptance: float, draft_length: int) -> float:
    """Leviathan's (1 - a^(g+1)) / (1 - a), the target's own token included."""
    return sum(acceptance**position for position in range(draft_length + 1))


def predicted_speedup(acceptance: float, draft_length: int, cost_ratio: float) -> float:
    """Leviathan's speed-up over the target alone, which verifies as fast as it generates one token."""
    return tokens_per_round(acceptance, draft_length) / (draft_length * cost_ratio + 1)


def acceptance_for(speedup: float, draft_length: int, round_cost: float) -> float | None:
    """The acceptance for a speed-up where a round takes as long as `round_cost` tokens of the target alone.

    None where not even accepting every token is enough.
    """
    needed = speedup * round_cost
    if needed > draft_length + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if tokens_per_round(middle, draft_length) >= needed else (middle, high)
    return high
