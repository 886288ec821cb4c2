"""The plan of GPUs that share sequences: a part of the activations, and the all-to-alls by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.gpus import gpu_named, network_of
from tinyllama_ds.planning.communication import Hosts
from tinyllama_ds.planning.plan import Plan, PlanRequest, make_plan, read_inputs
from tinyllama_ds.planning.timing import Machines

CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero3.json"


def plan_of(shared: int, recompute_every: int = 0, gpus: int = 8) -> Plan:
    """TinyLlama v1 on one host, 8 sequences in a micro-batch."""
    gpu = gpu_named("h100")
    machines = Machines(Hosts(1, gpus), gpu, network_of(gpu, 100), 4e14, "assumed")
    request = PlanRequest(
        "tinyllama-v1", CONFIG, machines, activation_checkpointing=recompute_every, sequence_parallel=shared
    )
    inputs = read_inputs("tinyllama-v1", CONFIG)
    return make_plan(request, replace(inputs, raw=inputs.raw | {"train_micro_batch_size_per_gpu": 8}), {})


def rows_of(plan: Plan) -> dict[str, int]:
    return {row.name: row.bytes for row in plan.memory.rows}


@pytest.mark.parametrize("recompute_every", [0, 1])
def test_activations_are_shared_and_states_are_as_before(recompute_every: int) -> None:
    alone, shared = (rows_of(plan_of(number, recompute_every)) for number in (1, 2))
    kept = ("block inputs", "activations", "recomputed block", "RoPE tables")
    in_all, of_part = (sum(rows.get(name, 0) for name in kept) for rows in (alone, shared))
    assert of_part == pytest.approx(in_all / 2, rel=0.12 if recompute_every == 0 else 0.05)
    assert {shared[name] for name in ("weights", "optimizer", "gradients")} == {
        alone[name] for name in ("weights", "optimizer", "gradients")
    }


def test_the_same_batch_and_speed_but_for_the_exchange() -> None:
    """Per block of 2,048 hidden and 4 x 64 key sizes, in bf16: q, k, v and the output, there and back."""
    alone, shared, recomputed = plan_of(1), plan_of(4), plan_of(4, recompute_every=1)
    assert shared.accumulations == tuple(4 * count for count in alone.accumulations)
    assert shared.steps[0].compute == pytest.approx(alone.steps[0].compute)
    tokens = 2_097_152 // 8  # of a GPU and step
    for plan, passes in ((shared, 2), (recomputed, 3)):
        (exchange,) = [part for part in plan.steps[0].traffic if part.collective.kind == "all-to-all"]
        assert exchange.collective.bytes == 22 * passes * tokens * 2 * (2048 + 256 + 256 + 2048)
        assert exchange.collective.calls == 22 * passes * 2 * plan.accumulations[0]
        assert exchange.per_gpu == exchange.collective.bytes * 3 / 4
        assert exchange.per_node == 0
    wide = plan_of(8)  # each of the 4 key heads goes to 2 GPUs
    assert wide.work.key_heads(wide.inputs.model) == 8


def test_what_does_not_divide_is_rejected() -> None:
    with pytest.raises(ConfigError, match="--sequence-parallel 3 does not divide the 8 GPUs of a host"):
        plan_of(3)
    with pytest.raises(ConfigError, match="--sequence-parallel 3 does not divide the 32 query heads"):
        plan_of(3, gpus=12)
