"""A rank's fragments of master weights and optimizer state, under any ZeRO stage.

DeepSpeed flattens parameters into partitions, which its optimizer steps; a fragment is the part of one parameter that
lies in one partition. Values are read and written in place, without a collective.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MASTER = "master"  # the kind of the weights themselves, next to those of the optimizer: exp_avg, exp_avg_sq, ...
_MOMENTUM = "momentum_buffer"  # of Muon


@dataclass(frozen=True)
class Slot:
    """The elements `start` to `stop` of a flattened parameter, from `offset` on in a tensor of `total` elements."""

    start: int
    stop: int
    offset: int
    total: int


@dataclass(frozen=True)
class Fragment:
    """The elements `start` to `stop` of a flattened parameter, at `offset` of a partition."""

    name: str
    start: int
    stop: int
    partition: Tensor  # (elements,), or the parameter itself; a key of the optimizer's state
    offset: int
    momentum: Slot | None = None  # of Muon at stages 1 and 2: of the whole parameter, though its weights are divided

    def values(self, state: dict[str, Tensor], kind: str) -> Tensor:
        """A view of the fragment's values of a kind; `state` is the optimizer's for the partition."""
        first = self.slot(kind).start
        return self._slot_values(state, kind)[self.start - first : self.stop - first]

    def fill(self, state: dict[str, Tensor], kind: str, values: Tensor) -> None:
        """Overwrite the values of a kind in its slot."""
        self._slot_values(state, kind).copy_(values)

    def slot(self, kind: str) -> Slot:
        """Where the optimizer has values of a kind of the parameter, in its state for the partition."""
        if self.momentum and kind == _MOMENTUM:
            return self.momentum
        return Slot(self.start, self.stop, self.offset, self.partition.numel())

    def _slot_values(self, state: dict[str, Tensor], kind: str) -> Tensor:
        slot = self.slot(kind)
        flat = (self.partition.detach() if kind == MASTER else state[kind]).view(-1)
        return flat[slot.offset : slot.offset + slot.stop - slot.start]


@dataclass(frozen=True)
class Zero3Fragment(Fragment):
    """The same under ZeRO-3, through DeepSpeed's public API, which also finds what is offloaded to a disk."""

    parameter: Any = None  # with what DeepSpeed adds to it: partition_numel, ds_tensor

    def values(self, state: dict[str, Tensor], kind: str) -> Tensor:
        """On the device; of what is offloaded a copy. Without the padding, which the last ranks have."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if kind == MASTER:
            local = safe_get_local_fp32_param(self.parameter)
        else:
            local = safe_get_local_optimizer_state(self.parameter, kind)
        return local.detach()[: self.stop - self.start]

    def fill(self, state: dict[str, Tensor], kind: str, values: Tensor) -> None:
        """Overwrite them; padding is zero."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        padded = torch.nn.functional.pad(values, (0, self.parameter.partition_numel() - len(values)))
        if kind == MASTER:
            safe_set_local_fp32_param(self.parameter, padded)
        else:
            safe_set_local_optimizer_state(self.parameter, padded, kind)


def local_fragments(engine: "DeepSpeedEngine") -> Iterator[Fragment]:
    """All fragments of this rank, in the order of the optimizer. At stage 0 every rank has all parameters whole."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        yield from _of_zero_3(engine, names)
    elif stage > 0:
        yield from _of_zero_1_and_2(engine, names)
    else:
        yield from _of_replicas(engine, names)


def fragments_to_save(engine: "DeepSpeedEngine", rank: int, ranks: int) -> list[Fragment]:
    """The fragments that a rank writes: its own, and of those that all ranks have every `ranks`-th."""
    fragments = list(local_fragments(engine))
    return fragments if engine.zero_optimization() else fragments[rank::ranks]


def parameter_shapes(engine: "DeepSpeedEngine") -> dict[str, list[int]]:
    """The whole shape of every parameter, whether it is partitioned or not, in the order of the model."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def optimizer_state(engine: "DeepSpeedEngine", fragment: Fragment) -> dict:
    """What the optimizer keeps for the fragment's partition: nothing before its first step."""
    return engine.basic_optimizer.state.get(fragment.partition, {})


def kinds_of(state: dict) -> list[str]:
    """The kinds of a fragment's values: its master weights, and a value per element for each of the optimizer's."""
    return [MASTER, *(key for key, value in state.items() if torch.is_tensor(value) and key != "step")]


def refresh_weights(engine: "DeepSpeedEngine") -> None:
    """Collective. Round the master weights into the weights that the forward pass uses, as after a step."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # partitions the parameters that stay gathered
        for fragment in local_fragments(engine):
            assert isinstance(fragment, Zero3Fragment)
            fragment.parameter.ds_tensor.data[: fragment.stop - fragment.start].copy_(fragment.values({}, MASTER))
        engine.optimizer.checkpoint_event_epilogue()  # gathers them again, and drops the copies of hpZ
    elif stage > 0:
        engine.optimizer.update_lp_params()
    elif engine.bfloat16_enabled():
        parameters = dict(engine.module.named_parameters())
        for fragment in local_fragments(engine):
            parameters[fragment.name].data.view(-1).copy_(fragment.values({}, MASTER))


def _of_zero_3(engine: "DeepSpeedEngine", names: dict[torch.nn.Parameter, str]) -> Iterator[Fragment]:
    """Every parameter is divided into equal parts, the last ones padded, and a partition is a sub-group of them."""
    rank = torch.distributed.get_rank()
    for parameters, partition in zip(
        engine.optimizer.fp16_groups, engine.optimizer.fp32_partitioned_groups_flat, strict=True
    ):
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start, stop = (min(place * size, parameter.ds_numel) for place in (rank, rank + 1))
            if start < stop:
                yield Zero3Fragment(names[parameter], start, stop, partition, offset, parameter=parameter)
            offset += size


def _of_zero_1_and_2(engine: "DeepSpeedEngine", names: dict[torch.nn.Parameter, str]) -> Iterator[Fragment]:
    """The parameters of a group are contiguous in one storage, which is divided into equal partitions.

    DeepSpeed's own addresses, which `safe_get_full_fp32_param` takes, are wrong under `round_robin_gradients`
    (deepspeed/runtime/zero/stage_1_and_2.py, `_link_all_hp_params`); the weights' offsets in the storage are right.
    """
    optimizer = engine.optimizer
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    for parameters, group in zip(groups, engine.basic_optimizer.param_groups, strict=True):
        (partition,) = group["params"]
        start = torch.distributed.get_rank() * partition.numel()
        ranges = {parameter: _range_inside(parameter, start, start + partition.numel()) for parameter in parameters}
        inside = sorted((p for p in parameters if ranges[p]), key=Tensor.storage_offset)
        total, before = sum(map(Tensor.numel, inside)), 0
        for parameter in inside:
            part, offset = ranges[parameter], max(0, parameter.storage_offset() - start)
            momentum = Slot(0, parameter.numel(), before, total) if _keeps_whole_momentum(optimizer) else None
            yield Fragment(names[parameter], part.start, part.stop, partition, offset, momentum)
            before += parameter.numel()


def _range_inside(parameter: Tensor, start: int, stop: int) -> range:
    """The elements of a parameter between two offsets of its storage."""
    place = parameter.storage_offset()
    return range(max(0, start - place), min(parameter.numel(), stop - place))


def _keeps_whole_momentum(optimizer: Any) -> bool:
    """DeepSpeed steps Muon on whole gradients; those of fp32 sums in bf16 and of offload find other ways to that."""
    return hasattr(optimizer, "bit16_groups") and not optimizer.cpu_offload


def _of_replicas(engine: "DeepSpeedEngine", names: dict[torch.nn.Parameter, str]) -> Iterator[Fragment]:
    """Stage 0: the parameters are the master weights; in bf16 these are of each parameter, or end to end."""
    if not engine.bfloat16_enabled():
        for parameter, name in names.items():
            yield Fragment(name, 0, parameter.numel(), parameter, 0)
        return
    wrapper = engine.optimizer
    is_flat = hasattr(wrapper, "fp32_groups_flat")
    for number, parameters in enumerate(wrapper.fp16_groups):
        masters = [wrapper.fp32_groups_flat[number]] * len(parameters) if is_flat else wrapper.fp32_groups[number]
        offset = 0
        for parameter, master in zip(parameters, masters, strict=True):
            yield Fragment(names[parameter], 0, parameter.numel(), master, offset)
            offset += parameter.numel() if is_flat else 0
