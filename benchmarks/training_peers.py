"""Tokens per second of one training step: ours beside what a user would pick instead, same model, tokens and machine.

    python benchmarks/training_peers.py --json benchmarks/results/training_peers_cpu.json

With a GPU it is TinyLlama-1.1B on one rank, 16k tokens per micro batch, without activation checkpointing: one contender
after the other, because each wants the memory. Else it is 26.7M parameters on two ranks of one thread each (`plain` is
one process with two threads, about 1.2 GB per process): every contender starts once and warms up, then each in turn
trains a step while the rest wait, round after round, so that a drift of the machine hits all. Ours run in the
environment that `tinyllama-ds pretrain` gives its ranks. litgpt is not among our dependencies: install it
(`pip install litgpt`), or leave its row out with --only. Nothing is downloaded.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tinyllama_ds.launch.launcher import Placement, launcher_environment
from tinyllama_ds.model.attention import Demands, Device, capability_of, resolve_attention_backend
from tinyllama_ds.model.config import LlamaConfig, model_config
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model
from tinyllama_ds.network import free_port
from tinyllama_ds.training.metrics import measured_peak, memory_bytes


@dataclass(frozen=True)
class Size:
    """What is trained, in which shape, on how many ranks of which device."""

    device: str
    model: LlamaConfig
    sequence_length: int
    micro_batch: int
    accumulation: int
    ranks: int

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.ranks * self.accumulation * self.micro_batch * self.sequence_length


ON_CPU = Size("cpu", LlamaConfig(8192, 512, 1472, 6, 8, 4, 512), 512, 4, 8, 2)  # 26.7M parameters
ON_GPU = Size("cuda", model_config("tinyllama-1.1b"), 2048, 8, 4, 1)
SIZE = ON_GPU if torch.cuda.is_available() else ON_CPU
WARMUP_STEPS = 1 if SIZE is ON_CPU else 3


def deepspeed_config(name: str) -> dict:
    """A file of ds_configs/, with small buckets for the small model and everything else as it is."""
    config = json.loads((Path(__file__).parents[1] / "ds_configs" / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    if SIZE is ON_CPU:
        gather_bucket = "stage3_prefetch_bucket_size" if zero["stage"] == 3 else "allgather_bucket_size"
        zero |= {"reduce_bucket_size": 2_000_000, gather_bucket: 2_000_000}
    size = {"train_micro_batch_size_per_gpu": SIZE.micro_batch, "gradient_accumulation_steps": SIZE.accumulation}
    timers = {"timers": {"throughput": {"enabled": False}}}
    keep = {key: config[key] for key in ("gradient_clipping", "bf16", "data_types", "optimizer")}
    return keep | size | timers | {"zero_optimization": zero}


def ours(name: str, attention: str = "auto") -> Callable[[], None]:
    """Our model, engine and step, blocks compiled, as `tinyllama-ds pretrain --compile on` runs them."""
    from tinyllama_ds.training.compilation import compile_blocks
    from tinyllama_ds.training.engine import start_process_group, wrap
    from tinyllama_ds.training.world import read_world

    start_process_group(read_world())
    model = our_model(attention)
    compile_blocks(model)
    engine = wrap(model, deepspeed_config(name), 1.0)
    return deepspeed_step(engine, lambda inputs, labels: engine(inputs, labels))


def our_model(attention: str) -> LlamaForCausalLM:
    device = Device(SIZE.device, capability_of(torch.device(SIZE.device)))
    choice = resolve_attention_backend(attention, device, Demands(sixteen_bit=True))
    return build_model(SIZE.model, choice.backend, seed=1)


def transformers_deepspeed() -> Callable[[], None]:
    """transformers' LlamaForCausalLM under the same DeepSpeed JSON, with its own loss."""
    import deepspeed

    from tinyllama_ds.convert import hf_model
    from tinyllama_ds.training.engine import start_process_group
    from tinyllama_ds.training.world import read_world

    start_process_group(read_world())
    model = hf_model(dict(our_model("sdpa").state_dict()), SIZE.model).train()
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=deepspeed_config("zero3_keep")
    )
    return deepspeed_step(engine, lambda inputs, labels: engine(input_ids=inputs, labels=inputs).loss)


def deepspeed_step(engine, loss_of) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    def step() -> None:
        for number in range(SIZE.accumulation):
            engine.set_gradient_accumulation_boundary(number == SIZE.accumulation - 1)
            engine.backward(loss_of(*batch()) / SIZE.accumulation, scale_wrt_gas=False)
        engine.step()

    return step


def fsdp2(attention: str) -> Callable[[], None]:
    """PyTorch's fully_shard around our model, blocks compiled, bf16 compute and fp32 reduction."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo" if SIZE.device == "cpu" else "nccl")
    model = our_model(attention).to(SIZE.device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        layer.compile()
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        for number in range(SIZE.accumulation):
            model.set_requires_gradient_sync(number == SIZE.accumulation - 1)
            (model(*batch()) / SIZE.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(attention: str) -> Callable[[], None]:
    """Our model in a plain loop, blocks compiled."""
    model = our_model(attention).to(SIZE.device)
    for layer in model.model.layers:
        layer.compile()
    return plain_loop(model, model)


def litgpt() -> Callable[[], None]:
    """litgpt's model of the same shape in the same plain loop, compiled as a whole, with its own chunked loss."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape = SIZE.model
    config = Config(
        block_size=SIZE.sequence_length, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_hidden_layers, n_head=shape.num_attention_heads, n_embd=shape.hidden_size,
        n_query_groups=shape.num_key_value_heads, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=shape.intermediate_size,
    )  # fmt: skip
    model = GPT(config).to(SIZE.device)
    forward = torch.compile(model)
    return plain_loop(model, lambda inputs, labels: chunked_cross_entropy(forward(inputs), labels))


def plain_loop(model: torch.nn.Module, loss_of: Callable) -> Callable[[], None]:
    """One process and all threads: bf16 weights with fp32 masters, all micro batches of the step."""
    masters = copy.deepcopy(model)
    model.bfloat16()
    optimizer = torch.optim.AdamW(masters.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))

    def step() -> None:
        for _ in range(SIZE.accumulation * SIZE.ranks):
            (loss_of(*batch()) / SIZE.accumulation / SIZE.ranks).backward()
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
    "ours, ZeRO-3": (SIZE.ranks, lambda: ours("zero3_keep")),
    "ours, ZeRO-3, weights released": (SIZE.ranks, lambda: ours("zero3")),
    "ours, ZeRO-1": (SIZE.ranks, lambda: ours("zero1")),
    "ours, ZeRO-3, sdpa": (SIZE.ranks, lambda: ours("zero3_keep", "sdpa")),
    "transformers + DeepSpeed ZeRO-3": (SIZE.ranks, transformers_deepspeed),
    "FSDP2, compiled, sdpa": (SIZE.ranks, lambda: fsdp2("sdpa")),
    "FSDP2, compiled, our attention": (SIZE.ranks, lambda: fsdp2("auto")),
    "plain loop, compiled, sdpa": (1, lambda: plain("sdpa")),
    "plain loop, compiled, our attention": (1, lambda: plain("auto")),
    "plain loop, litgpt's model, compiled": (1, litgpt),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh random tokens: inputs and labels (B, T)."""
    tokens = torch.randint(SIZE.model.vocab_size, (SIZE.micro_batch, SIZE.sequence_length + 1), device=SIZE.device)
    return tokens[:, :-1], tokens[:, 1:]


def serve(name: str) -> None:
    """Run inside the ranks: after the warm-up, a step for every line on stdin, its seconds and peak bytes on stdout."""
    ranks, build = CONTENDERS[name]
    if SIZE is ON_CPU:
        torch.set_num_threads(SIZE.ranks // ranks)
    step = build()
    for _ in range(WARMUP_STEPS):
        step()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        if SIZE is ON_GPU:
            torch.cuda.synchronize()
        print(json.dumps([time.perf_counter() - started, memory_bytes(torch.device(SIZE.device))]), flush=True)
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

    def wait_until_warm(self) -> None:
        for process in self._ranks:
            self._read(process)
        print(f"{self.name} is warm", flush=True)

    def step(self) -> tuple[float, int]:
        """Let all ranks train one step; seconds and peak bytes of the rank with the most."""
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
        seconds, peaks = zip(*(self._read(process) for process in self._ranks), strict=True)
        return max(seconds), max(peaks)

    def end(self) -> None:
        for process in self._ranks:
            process.kill()
            process.wait()

    def _read(self, process: subprocess.Popen) -> Any:
        assert process.stdout is not None
        for line in process.stdout:  # libraries print there too
            if line.startswith(('"ready"', "[")):
                with suppress(json.JSONDecodeError):
                    return json.loads(line)
        raise RuntimeError(f"{self.name} ended with code {process.wait()}")


def environment_of(name: str, rank: int, port: str) -> dict[str, str]:
    ranks, _ = CONTENDERS[name]
    environment = dict(os.environ)
    if name.startswith("ours"):
        environment = launcher_environment(Placement(None, [], SIZE.ranks, on_cpu=SIZE is ON_CPU))
    if SIZE is ON_CPU:
        one_process = {"OMP_NUM_THREADS": str(SIZE.ranks // ranks), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment |= one_process | {"DS_ACCELERATOR": "cpu"}
    return environment | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip


@dataclass
class Result:
    """Of one contender: tokens per second of every round, and the peak memory of a process."""

    rates: list[float] = field(default_factory=list)
    peak_gib: float = 0.0


def measure(names: list[str], rounds: int) -> dict[str, Result]:
    """All contenders in turn; on a GPU one after the other, and one that fails (out of memory, say) leaves no row."""
    if SIZE is ON_CPU:
        return measure_in_turn(names, rounds)
    results: dict[str, Result] = {}
    for name in names:
        try:
            results |= measure_in_turn([name], rounds)
        except RuntimeError as failure:
            print(failure, flush=True)
    return results


def measure_in_turn(names: list[str], rounds: int) -> dict[str, Result]:
    """A step of each, round after round, while the others wait."""
    contenders: list[Contender] = []
    results = {name: Result() for name in names}
    try:
        for name in names:
            contenders.append(Contender(name))
            contenders[-1].wait_until_warm()
        for number in range(rounds):
            for contender in contenders:
                seconds, peak = contender.step()
                result = results[contender.name]
                result.rates.append(SIZE.tokens / seconds)
                result.peak_gib = peak / 2**30
                print(f"round {number + 1}: {contender.name}: {result.rates[-1]:,.0f} tokens/s", flush=True)
    finally:
        for contender in contenders:
            contender.end()
    return results


def table(results: dict[str, Result], peak: float) -> str:
    """A line per contender: tokens/s, the part of the matrix product's rate, memory, and the first one's rate / its."""
    first = next(iter(results))
    lines = [f"{'':<38}{'tokens/s':>10}{'of matmul':>11}{'GiB':>8}  {first} / it, median of rounds (min to max)"]
    for name, result in results.items():
        ratios = [ours / theirs for ours, theirs in zip(results[first].rates, result.rates, strict=True)]
        rate = statistics.median(result.rates)
        share = rate * SIZE.model.flops_per_token(SIZE.sequence_length) / peak
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"{name:<38}{rate:>10,.0f}{share:>11.1%}{result.peak_gib:>8.2f}  {spread}")
    return "\n".join(lines)


def main() -> None:
    """Measure all contenders and print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    peak = measured_peak(torch.device(SIZE.device), torch.bfloat16)
    if SIZE is ON_GPU:
        torch.cuda.empty_cache()  # the contenders need the memory
    results = measure(options.only, options.rounds)
    print(f"\n{table(results, peak)}\nmatmul: {peak / 1e12:.2f} TFLOP/s in bf16, measured before the contenders")
    if options.json:
        options.json.parent.mkdir(exist_ok=True)
        rows = {name: asdict(result) for name, result in results.items()}
        content = {"machine": machine(), "matmul_flops": peak, "results": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return None


def machine() -> dict[str, str | int | None]:
    """What the figures were measured on, and with which versions."""
    found: dict[str, str | int | None] = {"processor": cpu_name(), "cores": os.cpu_count()}
    if SIZE is ON_GPU:
        found["gpu"] = torch.cuda.get_device_name()
    found["python"] = platform.python_version()
    for package in ("torch", "deepspeed", "transformers", "flash-attn", "litgpt"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def cpu_name() -> str:
    """The processor's model name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
