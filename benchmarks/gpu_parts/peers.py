"""Ours next to transformers under the same JSON, a plain compiled loop and FSDP2: in turn, as far as memory allows."""

import sys
from statistics import median

import torch

from contenders import SIZES
from gpu_parts.common import Part, part_of_arguments
from training_peers import Contender, Result, run_in_turn

OURS = "ours, ZeRO-3"
TRANSFORMERS = "transformers + DeepSpeed ZeRO-3"
PEERS = (TRANSFORMERS, "plain loop, compiled, our attention", "FSDP2, compiled, our attention")
# One step of transformers without recomputation needs some 70 GiB, and ours keep 20 GiB while they wait.
ROOM_FOR_BOTH = 100 * 2**30
ROUNDS, STEPS = 3, 3  # of each contender, and of each round


class Race:
    """Ours, which stay once they are started, and one peer after another."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._size_name = "tiny" if part.rehearse else "gpu"
        self._flops = part.matmul_flops()
        self._results: dict[str, Result] = {}
        self._ours: Contender | None = None

    def run(self, peer: str) -> None:
        """Rounds of ours and a peer in turn, or of the peer alone where both do not fit; a failure becomes a line."""
        beside = None
        try:
            group = [] if self._is_alone(peer) else [self._start_ours()]
            beside = Contender(peer, self._size_name)
            beside.wait_until_warm()
            steps = 1 if self._part.rehearse else STEPS
            run_in_turn([*group, beside], self._results, ROUNDS, steps, after_each=self._report)
        except RuntimeError as failure:
            self._part.figures.check(f"{peer}.ran", False, f"{peer}: {failure}")
            self.end()  # it may be ours that failed; the next peer gets new ones
        finally:
            if beside is not None:
                beside.end()

    def end(self) -> None:
        if self._ours is not None:
            self._ours.end()
            self._ours = None

    def _start_ours(self) -> Contender:
        if self._ours is None:
            self._ours = Contender(OURS, self._size_name)
            self._ours.wait_until_warm()
            self._ours.run(1)  # gives back the memory of its activations
        return self._ours

    def _is_alone(self, peer: str) -> bool:
        if self._part.rehearse or peer != TRANSFORMERS:
            return False
        return torch.cuda.get_device_properties(0).total_memory < ROOM_FOR_BOTH

    def _report(self) -> None:
        """A line per contender. A ratio is of rounds in turn where there were such, else of medians."""
        size = SIZES[self._size_name]
        ours = self._results.get(OURS, Result()).rates
        for name, result in self._results.items():
            rate = median(result.rates)
            share = rate * size.model.flops_per_token(size.sequence_length) / self._flops
            text = f"{name:<36}{rate:>9,.0f} tokens/s, {share:.1%} of the matrix product, {result.peak_gib:.2f} GiB"
            if name != OURS and ours:
                ratio = median(ours) / rate
                self._part.figures.put(f"{name}.ours_by_it", ratio)
                text += f", ours / it {ratio:.2f}{' (alone)' if self._is_alone(name) else ''}"
            self._part.figures.put(f"{name}.peak_gib", result.peak_gib)
            self._part.figures.put(f"{name}.rates", result.rates)
            self._part.figures.put(f"{name}.tokens_per_second", rate, text)


def main(part: Part) -> int:
    """All peers; what needs the whole GPU goes first, before ours take their place."""
    race = Race(part)
    try:
        for peer in PEERS:
            race.run(peer)
    finally:
        race.end()
    return part.figures.end()


if __name__ == "__main__":
    sys.exit(main(part_of_arguments("peers")))
