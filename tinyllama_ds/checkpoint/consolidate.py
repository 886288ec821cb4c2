"""The weights of a checkpoint of any layout, whole, one after another: files are mapped, one tensor is in memory.

`zero_to_fp32` of DeepSpeed does this for stage 3 only; for stages 1 and 2 it first copies all partitions together.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from tinyllama_ds.files import without_wildcards


def whole_tensors(checkpoint: Path, zero_stage: int) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its name: of the fp32 masters, at stage 0 of the weights in the model's dtype.

    The checkpoint has been verified, since this unpickles it. Files are mapped until the last tensor is taken.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # merging is done in memory; unset, DeepSpeed prints its guess
    if zero_stage == 0:
        path = checkpoint / "mp_rank_00_model_states.pt"
        yield from torch.load(path, map_location="cpu", mmap=True, weights_only=False)["module"].items()
        return
    with without_wildcards(checkpoint.parent) as parent:  # DeepSpeed looks for the files with `glob`
        folder = parent / checkpoint.name
        yield from _partitioned_by_parameter(folder) if zero_stage == 3 else _partitioned_end_to_end(folder)


def _partitioned_by_parameter(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: each rank has its part of every parameter."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # DeepSpeed prints its way through the files
        lazy = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)
    for name, tensor in lazy.items():
        yield name, tensor.contiguous()


def _partitioned_end_to_end(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2: all parameters of a group lie end to end, and each rank has its stretch of that.

    DeepSpeed's own reader refuses what its optimizer for bf16 at stage 1 writes, which has no `zero_stage` in it.
    """
    from deepspeed.checkpoint import constants
    from deepspeed.utils import zero_to_fp32 as deepspeeds

    folder = str(checkpoint)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        shapes = deepspeeds.parse_model_states(deepspeeds.get_model_state_files(folder))[0].param_shapes
    states = [
        torch.load(file, map_location="cpu", mmap=True, weights_only=False)[constants.OPTIMIZER_STATE_DICT]
        for file in deepspeeds.get_optim_files(folder)  # by rank
    ]
    paddings = states[0].get(constants.PARAM_ALIGNMENT_PADDINGS)
    for group, inside in enumerate(shapes):
        partitions = [state[constants.SINGLE_PARTITION_OF_FP32_GROUPS][group] for state in states]
        start = 0
        for number, (name, shape) in enumerate(inside.items()):
            yield name, _stretch(partitions, start, shape.numel()).view(shape)
            start += shape.numel() + (paddings[group][number] if paddings else 0)


def _stretch(partitions: Sequence[Tensor], start: int, count: int) -> Tensor:
    pieces = []
    for partition in partitions:
        pieces.append(partition[max(start, 0) : max(start + count, 0)])
        start -= partition.numel()
    return torch.cat(pieces)
