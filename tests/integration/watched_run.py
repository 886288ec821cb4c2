"""Train as the only rank, and print as JSON the operators that ran on it and how kernels were chosen.

usage: watched_run.py, and the arguments of scripts/pretrain.py
"""

import argparse
import json
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinyllama_ds.commands.training import add_run_arguments, run_options
from tinyllama_ds.planning.fit import estimate_memory
from tinyllama_ds.train.engine import hard_exit
from tinyllama_ds.train.pretrain import pretrain


class Watch(TorchDispatchMode):
    """Names of all operators, and the dtype of their first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.switches: set[tuple[bool, str | None]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        dtypes = [str(value.dtype) for value in args if isinstance(value, torch.Tensor)]
        self.operators.add(f"{func._schema.name.removeprefix('aten::')} {dtypes[0] if dtypes else ''}")
        if func is torch.ops.aten.mm.default:
            workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
            self.switches.add((torch.are_deterministic_algorithms_enabled(), workspace))
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    options = run_options(parser.parse_args())
    with Watch() as watch:
        code = pretrain(options, estimate_memory)
    print(json.dumps({"operators": sorted(watch.operators), "switches": sorted(watch.switches)}))
    hard_exit(code)
