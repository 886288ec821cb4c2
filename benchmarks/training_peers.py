"""Tokens per second of one training step: ours beside what a user would pick instead, same model, tokens and machine.

    python benchmarks/training_peers.py --json benchmarks/results/training_peers_cpu.json

Every contender starts once and warms up; then each in turn trains a step while the rest wait, round after round,
so that a drift of the machine hits all. Ours run in the environment that `tinyllama-ds pretrain` gives its ranks.
litgpt is not among our dependencies: install it (`pip install litgpt`), or leave its row out with --only.
Ranks: two of one thread each; `plain` is one process with two threads. About 1.2 GB per process; nothing is downloaded.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from tinyllama_ds.launch.launcher import Placement, launcher_environment
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.network import free_port

MODEL = LlamaConfig(8192, 512, 1472, 6, 8, 4, 512)  # 26.7M parameters
T, MICRO_BATCH, ACCUMULATION, RANKS = 512, 4, 8, 2
WARMUP_STEPS = 1


def deepspeed_config(name: str) -> dict:
    """A file of ds_configs/ at this size: small buckets, everything else as it is."""
    config = json.loads((Path(__file__).parents[1] / "ds_configs" / f"{name}.json").read_text())
    zero = config["zero_optimization"] | {"reduce_bucket_size": 2_000_000}
    zero |= {"stage3_prefetch_bucket_size": 2_000_000} if zero["stage"] == 3 else {"allgather_bucket_size": 2_000_000}
    size = {"train_micro_batch_size_per_gpu": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION}
    timers = {"timers": {"throughput": {"enabled": False}}}
    keep = {key: config[key] for key in ("gradient_clipping", "bf16", "data_types", "optimizer")}
    return keep | size | timers | {"zero_optimization": zero}


def ours(name: str, attention: str = "blocked") -> Callable[[], None]:
    """Our model, engine and step, blocks compiled, as `tinyllama-ds pretrain --compile` runs them."""
    from tinyllama_ds.training.compilation import compile_blocks
    from tinyllama_ds.training.engine import start_process_group, wrap
    from tinyllama_ds.training.world import read_world

    start_process_group(read_world())
    model = build_model(MODEL, attention, seed=1)
    compile_blocks(model)
    engine = wrap(model, deepspeed_config(name), 1.0)
    return deepspeed_step(engine, lambda inputs, labels: engine(inputs, labels))


def transformers_deepspeed() -> Callable[[], None]:
    """transformers' LlamaForCausalLM under the same DeepSpeed JSON, with its own loss."""
    import deepspeed

    from tinyllama_ds.convert import hf_model
    from tinyllama_ds.training.engine import start_process_group
    from tinyllama_ds.training.world import read_world

    start_process_group(read_world())
    model = hf_model(dict(build_model(MODEL, "sdpa", seed=1).state_dict()), MODEL).train()
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=deepspeed_config("zero3_keep")
    )
    return deepspeed_step(engine, lambda inputs, labels: engine(input_ids=inputs, labels=inputs).loss)


def deepspeed_step(engine, loss_of) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    def step() -> None:
        for number in range(ACCUMULATION):
            engine.set_gradient_accumulation_boundary(number == ACCUMULATION - 1)
            engine.backward(loss_of(*batch()) / ACCUMULATION, scale_wrt_gas=False)
        engine.step()

    return step


def fsdp2(attention: str) -> Callable[[], None]:
    """PyTorch's fully_shard around our model, blocks compiled, bf16 compute and fp32 reduction."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    model = build_model(MODEL, attention, seed=1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        layer.compile()
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        for number in range(ACCUMULATION):
            model.set_requires_gradient_sync(number == ACCUMULATION - 1)
            (model(*batch()) / ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(attention: str) -> Callable[[], None]:
    """Our model in a plain loop, blocks compiled."""
    model = build_model(MODEL, attention, seed=1)
    for layer in model.model.layers:
        layer.compile()
    return plain_loop(model, model)


def litgpt() -> Callable[[], None]:
    """litgpt's model of the same shape in the same plain loop, compiled as a whole, with its own chunked loss."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=T, vocab_size=MODEL.vocab_size, padded_vocab_size=MODEL.vocab_size, n_layer=MODEL.num_hidden_layers,
        n_head=MODEL.num_attention_heads, n_embd=MODEL.hidden_size, n_query_groups=MODEL.num_key_value_heads,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", intermediate_size=MODEL.intermediate_size,
    )  # fmt: skip
    model = GPT(config)
    forward = torch.compile(model)
    return plain_loop(model, lambda inputs, labels: chunked_cross_entropy(forward(inputs), labels))


def plain_loop(model: torch.nn.Module, loss_of: Callable) -> Callable[[], None]:
    """One process and all threads: bf16 weights with fp32 masters, all micro batches of the step."""
    masters = copy.deepcopy(model)
    model.bfloat16()
    optimizer = torch.optim.AdamW(masters.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))

    def step() -> None:
        for _ in range(ACCUMULATION * RANKS):
            (loss_of(*batch()) / ACCUMULATION / RANKS).backward()
            for master, weight in pairs:
                grad = weight.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in pairs:
                weight.copy_(master)
                master.grad = None

    return step


CONTENDERS: dict[str, tuple[int, Callable[[], Callable[[], None]]]] = {
    "ours, ZeRO-3": (RANKS, lambda: ours("zero3_keep")),
    "ours, ZeRO-3, weights released": (RANKS, lambda: ours("zero3")),
    "ours, ZeRO-1": (RANKS, lambda: ours("zero1")),
    "ours, ZeRO-3, sdpa": (RANKS, lambda: ours("zero3_keep", "sdpa")),
    "transformers + DeepSpeed ZeRO-3": (RANKS, transformers_deepspeed),
    "FSDP2, compiled, sdpa": (RANKS, lambda: fsdp2("sdpa")),
    "FSDP2, compiled, our attention": (RANKS, lambda: fsdp2("blocked")),
    "plain loop, compiled, sdpa": (1, lambda: plain("sdpa")),
    "plain loop, compiled, our attention": (1, lambda: plain("blocked")),
    "plain loop, litgpt's model, compiled": (1, litgpt),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh random tokens: inputs and labels (B, T)."""
    tokens = torch.randint(MODEL.vocab_size, (MICRO_BATCH, T + 1))
    return tokens[:, :-1], tokens[:, 1:]


def serve(name: str) -> None:
    """Run inside the ranks: after the warm-up, a step for every line on stdin, and its seconds on stdout."""
    ranks, build = CONTENDERS[name]
    torch.set_num_threads(RANKS // ranks)
    step = build()
    for _ in range(WARMUP_STEPS):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        print(time.perf_counter() - started, flush=True)
    os._exit(0)  # gloo's threads can abort at the interpreter's end


class Contender:
    """The processes of one contender, waiting for their turn."""

    def __init__(self, name: str) -> None:
        ranks, _ = CONTENDERS[name]
        port = str(free_port())
        self.name = name
        self._ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve", name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment_of(name, rank, port),
            )
            for rank in range(ranks)
        ]  # fmt: skip
        for process in self._ranks:
            self._read(process, "ready")

    def step_seconds(self) -> float:
        """Let all ranks train one step; the slowest counts."""
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
        return max(float(self._read(process)) for process in self._ranks)

    def end(self) -> None:
        for process in self._ranks:
            process.kill()
            process.wait()

    def _read(self, process: subprocess.Popen, wanted: str | None = None) -> str:
        assert process.stdout is not None
        for line in process.stdout:  # libraries print there too
            text = line.strip()
            if text == wanted or (wanted is None and text.replace(".", "").isdigit()):
                return text
        raise RuntimeError(f"{self.name} ended with code {process.wait()}")


def environment_of(name: str, rank: int, port: str) -> dict[str, str]:
    ranks, _ = CONTENDERS[name]
    environment = dict(os.environ)
    if name.startswith("ours"):
        environment = launcher_environment(Placement(None, [], RANKS, on_cpu=True))
    return environment | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": str(RANKS // ranks), "DS_ACCELERATOR": "cpu",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip


def measure(names: list[str], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every contender in every round."""
    contenders: list[Contender] = []
    rates: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:
            contenders.append(Contender(name))
            print(f"{name} is warm", flush=True)
        for number in range(rounds):
            for contender in contenders:
                rate = RANKS * ACCUMULATION * MICRO_BATCH * T / contender.step_seconds()
                rates[contender.name].append(rate)
                print(f"round {number + 1}: {contender.name}: {rate:,.0f} tokens/s", flush=True)
    finally:
        for contender in contenders:
            contender.end()
    return rates


def main() -> None:
    """Measure all contenders in turn and print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    rates = measure(options.only, options.rounds)
    first = rates[options.only[0]]
    print(f"\n{'':<38}{'tokens/s':>10}  {options.only[0]} / it, median of rounds (min to max)")
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(first, values, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<38}{statistics.median(values):>10,.0f}  {spread}")
    if options.json:
        packages = {name: version(name) for name in ("torch", "deepspeed", "transformers", "litgpt")}
        machine = {"processor": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()} | packages
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "rates": rates}, indent=1) + "\n")
    return None


def cpu_name() -> str:
    """The processor's model name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
