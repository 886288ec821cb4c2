"""Attention backends on a CPU: milliseconds of forward and backward, one thread, four sequences of eight heads of 64.

OMP_NUM_THREADS=1 python benchmarks/attention_cpu.py
"""

import argparse
import time

import torch

from tinyllama_ds.commands.arguments import Parser, WholeNumber
from tinyllama_ds.model.attention import attention_function


def milliseconds(name: str, length: int, dtype: torch.dtype, repeats: int) -> float:
    """The best of several runs of one forward and backward pass."""
    q, k, v = (torch.randn(4, length, heads, 64, dtype=dtype, requires_grad=True) for heads in (8, 2, 2))
    upstream, attend = torch.randn_like(q), attention_function(name)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        attend(q, k, v, None).backward(upstream)
        best = min(best, time.perf_counter() - started)
    return best * 1000


def main() -> None:
    """Print a table: a row per dtype and length, and how many times faster `blocked` is than `sdpa`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=WholeNumber(1, 1_000_000), nargs="+", default=[128, 256, 512, 1024, 2048], metavar="TOKENS"
    )
    parser.add_argument("--repeats", type=WholeNumber(1, 1000), default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'dtype':<10}{'tokens':>7}{'sdpa':>9}{'blocked':>9}{'ratio':>7}")
    for dtype in (torch.bfloat16, torch.float32):
        for length in options.lengths:
            sdpa, blocked = (milliseconds(name, length, dtype, options.repeats) for name in ("sdpa", "blocked"))
            kind = str(dtype).removeprefix("torch.")
            print(f"{kind:<10}{length:>7}{sdpa:>9.1f}{blocked:>9.1f}{sdpa / blocked:>7.2f}")


if __name__ == "__main__":
    main()
