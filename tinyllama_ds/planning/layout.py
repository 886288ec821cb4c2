"""The layout of a model over ranks: the settings of a DeepSpeed JSON behind memory and communication, with defaults."""

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import LlamaConfig


@dataclass(frozen=True)
class Layout:
    """The part of a resolved DeepSpeed JSON that memory and communication depend on. Sizes in elements or bytes."""

    name: str
    stage: int
    weight_bytes: int  # per element: 2 in bf16, 4 in fp32
    gradient_bytes: int  # per element of the accumulated gradient
    reduce_bytes: int  # per element of a gradient on the wire
    master_bytes: int  # per element of the weights that the optimizer steps
    moment_bytes: int  # per element, all of the optimizer's moments
    overlap: bool
    reduce_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    max_live: int
    max_reuse: int
    hpz: int  # ranks that share a second copy of the weights; 1 is none
    offload_optimizer: bool

    @property
    def is_bf16_stage_1(self) -> bool:
        """DeepSpeed's BF16_Optimizer: gradients of all parameters accumulate in fp32 on every rank."""
        return self.stage == 1 and self.weight_bytes == 2 and self.gradient_bytes == 4 and not self.offload_optimizer

    def persists(self, elements: int) -> bool:
        """Whether ZeRO-3 keeps a parameter of that size on every rank."""
        return self.stage < 3 or elements <= self.persistence_threshold


def read_layout(resolved: dict, name: str, world_size: int) -> Layout:
    """The layout of a resolved DeepSpeed config. Defaults are those of DeepSpeed 0.19.8 (runtime/zero/config.py).

    Raises `ConfigError` for an hpZ partition that does not divide the ranks.
    """
    zero = resolved.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    is_bf16 = resolved.get("bf16", {}).get("enabled", False)
    weight_bytes = 2 if is_bf16 else 4
    dtype_bytes = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, None: weight_bytes}
    in_bf16 = resolved.get("bf16", {}).get("bf16_optimizer_states", False)  # and so are masters, which belong to it
    hpz = zero.get("zero_hpz_partition_size", 1)
    if stage == 3 and world_size % hpz:
        raise ConfigError(
            f"{name}: zero_hpz_partition_size {hpz} does not divide {world_size} ranks; expected the GPUs of one host"
        )
    return Layout(
        name=name,
        stage=stage,
        weight_bytes=weight_bytes,
        gradient_bytes=dtype_bytes[resolved.get("data_types", {}).get("grad_accum_dtype")],
        reduce_bytes=dtype_bytes[resolved.get("communication_data_type")],
        master_bytes=2 if in_bf16 else 4,
        moment_bytes=4 if in_bf16 else 8,
        overlap=zero.get("overlap_comm", stage == 3),
        reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        max_reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
        hpz=hpz if stage == 3 else 1,
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
    )


def modules_of(model: LlamaConfig) -> list[tuple[int, ...]]:
    """Elements of each parameter of each unit that ZeRO-3 gathers, in forward order: embedding, blocks, norm, head.

    A head that is tied to the embedding is the same parameter, gathered again.
    """
    D, E, F = model.hidden_size, model.head_dim, model.intermediate_size
    query, key = D * E * model.num_attention_heads, D * E * model.num_key_value_heads
    block = (query, key, key, query, D * F, D * F, D * F, D, D)
    table = (model.vocab_size * D,)
    return [table, *[block] * model.num_hidden_layers, (D,), table]


def persistent_elements(model: LlamaConfig, layout: Layout) -> int:
    """Elements that ZeRO-3 keeps on every rank."""
    units = modules_of(model)[: -1 if model.tie_word_embeddings else None]
    return sum(size for size in chain.from_iterable(units) if layout.persists(size))


@dataclass(frozen=True)
class Gathers:
    """Gathers of ZeRO-3's coordinator in one micro-batch, in elements."""

    forward: int
    backward: int
    peak_live: int


@lru_cache(maxsize=256)
def gathers_of(model: LlamaConfig, layout: Layout) -> Gathers:
    """Replay what DeepSpeed fetches, prefetches and releases in one micro-batch of a recorded trace."""
    coordinator = _Coordinator(model, layout)
    half = len(coordinator.order) // 2
    fetched = [coordinator.run(step) for step in range(2 * half)]
    return Gathers(sum(fetched[:half]), sum(fetched[half:]), coordinator.peak_live)


_Parameter = tuple[int, int, int]  # number of its unit, number in the unit, elements


class _Coordinator:
    """DeepSpeed's zero/partitioned_param_coordinator.py, reduced to which parameters are live and when.

    A unit's parameters are fetched when it runs; then the next ones of the trace are fetched ahead, while they fit the
    prefetch bucket and the live parameters; they are released after it ran, unless their next use lies within the reuse
    distance, or the look-ahead has passed over it already.
    """

    def __init__(self, model: LlamaConfig, layout: Layout) -> None:
        units = [
            [(unit, index, size) for index, size in enumerate(sizes) if not layout.persists(size)]
            for unit, sizes in enumerate(modules_of(model))
        ]
        if model.tie_word_embeddings:
            units[-1] = units[0]
        self.order: list[list[_Parameter]] = [*units, *reversed(units)]  # forward, then backward
        self.peak_live = 0
        self._layout = layout
        self._live: set[_Parameter] = set()
        self._queue = deque((step, parameter) for step, unit in enumerate(self.order) for parameter in unit)
        self._seen_up_to: dict[_Parameter, int] = {}  # the last use that fetching or looking ahead has passed

    def run(self, step: int) -> int:
        """Run one unit; returns the elements gathered for it."""
        fetched = self._gather(self.order[step])
        while self._queue and self._queue[0][0] <= step:
            self._pop()
        fetched += self._prefetch()
        self.peak_live = max(self.peak_live, self._num_live())
        self._live -= self._released(step)
        return fetched

    def _prefetch(self) -> int:
        limit = min(self._layout.max_live - self._num_live(), self._layout.prefetch_bucket)
        ahead = 0
        while self._queue and ahead < limit:
            ahead += self._gather([self._pop()])
        return ahead

    def _pop(self) -> _Parameter:
        step, parameter = self._queue.popleft()
        self._seen_up_to[parameter] = step
        return parameter

    def _gather(self, parameters: list[_Parameter]) -> int:
        missing = set(parameters) - self._live
        self._live |= missing
        return sum(size for _, _, size in missing)

    def _released(self, step: int) -> set[_Parameter]:
        released = {parameter for parameter in self.order[step] if self._seen_up_to[parameter] <= step}
        traversed = 0
        for unit in self.order[step + 1 :]:
            if traversed >= self._layout.max_reuse:
                break
            released -= set(unit)
            traversed += sum(size for _, _, size in unit)
        return released

    def _num_live(self) -> int:
        return sum(size for _, _, size in self._live)
