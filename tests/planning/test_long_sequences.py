"""Plans for long sequences of TinyLlama-1.1B: published arithmetic, host memory, and what the search finds."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllama_ds.cli import main
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.gpus import gpu_named, network_of
from tinyllama_ds.planning.communication import Hosts
from tinyllama_ds.planning.plan import Inputs, Plan, PlanRequest, make_plan, read_inputs
from tinyllama_ds.planning.search import reason, search
from tinyllama_ds.planning.timing import Machines

CONFIGS = Path(__file__).parents[2] / "ds_configs"
SEQUENCES = 16  # of a global batch


def inputs_of(tokens: int, folder: Path, config: str = "zero2") -> Inputs:
    """A recipe whose sequences have so many tokens, and a shipped file with a micro-batch of one of them."""
    recipe, json_file = folder / "long.toml", folder / "ds.json"
    batch = SEQUENCES * tokens
    recipe.write_text(f"""sequence_length = {tokens}
document_mask = true
[model]
vocab_size = 32000
hidden_size = 2048
intermediate_size = 5632
num_hidden_layers = 22
num_attention_heads = 32
num_key_value_heads = 4
max_position_embeddings = {tokens}
rms_norm_eps = 1e-5
rope_theta = 500000.0
[[stages]]
name = "extension"
tokens = {500 * batch}
global_batch_tokens = {batch}
weights = {{ slimpajama = 1.0 }}
""")
    raw = json.loads((CONFIGS / f"{config}.json").read_text()) | {"train_micro_batch_size_per_gpu": 1}
    raw["scheduler"]["params"]["warmup_num_steps"] = "auto"
    json_file.write_text(json.dumps(raw))
    return read_inputs(str(recipe), json_file)


def request_on(gpus: int, gpu: str = "h100", **more: object) -> PlanRequest:
    """At 45 % of the spec sheet."""
    card = gpu_named(gpu)
    machines = Machines(Hosts(1, gpus), card, network_of(card, 100), 0.45 * card.peak_flops, "assumed")
    options = argparse.Namespace(recipe="long", deepspeed_config=Path("ds.json"), machines=machines, **more)
    return PlanRequest(**vars(options), is_compiled=True)


def rows_of(plan: Plan) -> dict[str, int]:
    return {row.name: row.bytes for row in plan.memory.rows}


@pytest.mark.parametrize(("tokens", "rate"), [(32_768, 22_000), (131_072, 8_000)])
def test_one_gpu_trains_long_sequences(tokens: int, rate: int, tmp_path: Path) -> None:
    """6 operations per parameter of a product, causal attention, and a forward pass made again."""
    plan = make_plan(request_on(1, activation_checkpointing=1), inputs_of(tokens, tmp_path), {})
    assert plan.fits
    assert plan.duration.tokens_per_second == pytest.approx(rate, rel=0.02)
    assert rows_of(plan)["block inputs"] == 22 * tokens * 2 * 2048
    assert rows_of(plan)["RoPE tables"] == 8 * 64 * tokens


def test_offloaded_inputs_are_in_the_memory_of_the_host(tmp_path: Path) -> None:
    inputs = inputs_of(131_072, tmp_path)
    plain = make_plan(request_on(2, activation_checkpointing=1), inputs, {})
    offloaded = make_plan(request_on(2, activation_checkpointing=1, activation_offloading=True), inputs, {})
    block = 131_072 * 2 * 2048  # a power of two
    assert plain.memory.allocated - offloaded.memory.allocated == 20 * block
    assert (plain.host_bytes, offloaded.host_bytes) == (0, 2 * 22 * block)
    assert offloaded.duration.tokens_per_second == plain.duration.tokens_per_second  # copies overlap
    with pytest.raises(ConfigError, match="expected --activation-checkpointing 1 or more with it"):
        make_plan(request_on(2, activation_offloading=True), inputs, {})


def test_the_search_shares_sequences_and_offloads_where_that_helps(tmp_path: Path) -> None:
    """Sequences shared by eight GPUs need not be recomputed; on one small card nothing else fits."""
    best = search(request_on(8), inputs_of(131_072, tmp_path), {}).candidates[0]
    assert (best.work.recompute_every, best.work.offloads_activations) == (0, False)
    assert re.search(r"micro-batch 1, sequence parallelism over [48], no checkpointing:", reason(best))
    small = inputs_of(131_072, tmp_path, "zero2_bf16_states")
    best = search(request_on(1, "rtx-4090"), small, {}).candidates[0]
    assert "all blocks recomputed, their inputs offloaded:" in reason(best)
    enough = search(request_on(1), small, {})
    assert all(plan.work.sequence_parallel == 1 for plan in enough.candidates)
    assert not enough.candidates[0].work.offloads_activations


def test_a_given_number_of_gpus_is_kept_and_too_few_sequences_are_shared(tmp_path: Path) -> None:
    inputs = inputs_of(32_768, tmp_path)
    given = search(request_on(8, sequence_parallel=2), inputs, {}).candidates
    assert {plan.work.sequence_parallel for plan in given} == {2}
    hosts = replace(request_on(8).machines, hosts=Hosts(4, 8))
    shared = search(replace(request_on(8), machines=hosts), inputs, {}).candidates  # 16 sequences, 32 GPUs
    assert {plan.work.sequence_parallel for plan in shared} == {2, 4, 8}


def test_the_command_is_printed_with_all_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inputs_of(131_072, tmp_path, "zero2_bf16_states")
    words = ["--recipe", str(tmp_path / "long.toml"), "--deepspeed-config", str(tmp_path / "ds.json")]
    assert main(["plan", *words, "--num-gpus", "1", "--gpu", "rtx-4090", "--search"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("--activation-checkpointing 1 --activation-offloading")
    assert "memory of a host" in text
