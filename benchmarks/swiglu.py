"""SwiGLU three ways: milliseconds of forward and backward, and bytes kept for the backward, per token.

    python benchmarks/swiglu.py --hidden-size 2048 --intermediate-size 5632

Eager, compiled, and the fused kernels of Liger (`pip install liger-kernel`) and xFormers where they are installed and a
GPU is present; both keep the two projections and nothing else. Runs are taken in turn, so that a drift hits all.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tinyllama_ds.commands.arguments import Parser, WholeNumber
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import SwiGLU


def candidates(module: SwiGLU, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """What can run here, by name; all of them use the weights of `module`."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"eager": module, "compiled": torch.compile(module)}
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        found["Liger"] = lambda x: module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x)))
    if device.type == "cuda" and importlib.util.find_spec("xformers"):
        from xformers.ops import swiglu

        weights = (module.gate_proj.weight, None, module.up_proj.weight, None, module.down_proj.weight, None)
        found["xFormers"] = lambda x: swiglu(x, *weights)
    return found


def milliseconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """One forward and backward pass."""
    started = time.perf_counter()
    run(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def kept_bytes(run: Callable[[Tensor], Tensor], module: SwiGLU, x: Tensor) -> int:
    """Bytes of activations that the forward pass keeps for the backward, the input counted, weights not."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run(x)
    for parameter in module.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    output.sum().backward()
    return sum(kept.values())


def main() -> None:
    """Print a row per candidate."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=WholeNumber(1, 100_000), default=2048)
    parser.add_argument("--intermediate-size", type=WholeNumber(1, 1_000_000), default=5632)
    parser.add_argument("--tokens", type=WholeNumber(1, 1_000_000), default=2048)
    parser.add_argument("--rounds", type=WholeNumber(1, 1000), default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(32, options.hidden_size, options.intermediate_size, 1, 1, 1, options.tokens)
    module = SwiGLU(config).to(device, torch.bfloat16)
    x = torch.randn(1, options.tokens, options.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    runs = candidates(module, device)
    kept = {name: kept_bytes(run, module, x) for name, run in runs.items()}  # compiles, too
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            taken[name].append(milliseconds(run, x))
    print(f"{'':<10}{'ms':>9}{'bytes per token':>17}{'of eager':>10}")
    for name, times in taken.items():
        share = statistics.median(times) / statistics.median(taken["eager"])
        print(f"{name:<10}{statistics.median(times):>9.1f}{kept[name] / options.tokens:>17,.0f}{share:>10.2f}")


if __name__ == "__main__":
    main()
