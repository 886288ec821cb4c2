"""What trains in `training_peers.py`: ours and what a user would pick instead, each a function that makes a step."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tinyllama_ds.model.attention import Demands, Device, capability_of, resolve_attention_backend
from tinyllama_ds.model.config import LlamaConfig, model_config
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model

OneStep = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """What is trained, in which shape, on how many ranks of which device."""

    device: str
    model: LlamaConfig
    sequence_length: int
    micro_batch: int
    accumulation: int
    ranks: int
    warmup_steps: int

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.ranks * self.accumulation * self.micro_batch * self.sequence_length


SIZES = {
    "gpu": Size("cuda", model_config("tinyllama-1.1b"), 2048, 8, 4, 1, 3),
    "cpu": Size("cpu", LlamaConfig(8192, 512, 1472, 6, 8, 4, 512), 512, 4, 8, 2, 1),  # 26.7M parameters
    "tiny": Size("cpu", model_config("test"), 64, 2, 2, 1, 1),  # to rehearse
}


def deepspeed_config(name: str, size: Size) -> dict:
    """A file of ds_configs/, with small buckets for small models and everything else as it is."""
    config = json.loads((Path(__file__).parents[1] / "ds_configs" / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    if size.device == "cpu":
        gather_bucket = "stage3_prefetch_bucket_size" if zero["stage"] == 3 else "allgather_bucket_size"
        zero |= {"reduce_bucket_size": 2_000_000, gather_bucket: 2_000_000}
    shape = {"train_micro_batch_size_per_gpu": size.micro_batch, "gradient_accumulation_steps": size.accumulation}
    timers = {"timers": {"throughput": {"enabled": False}}}
    keep = {key: config[key] for key in ("gradient_clipping", "bf16", "data_types", "optimizer")}
    return keep | shape | timers | {"zero_optimization": zero}


def ours(size: Size, name: str, attention: str = "auto") -> OneStep:
    """Our model, engine and step, blocks compiled, as `tinyllama-ds pretrain --compile on` runs them."""
    from tinyllama_ds.distributed.world import read_world
    from tinyllama_ds.train.compile import compile_blocks
    from tinyllama_ds.train.engine import start_process_group, wrap

    start_process_group(read_world())
    model = our_model(size, attention)
    compile_blocks(model)
    engine = wrap(model, deepspeed_config(name, size), 1.0)
    return deepspeed_step(size, engine, lambda inputs, labels: engine(inputs, labels))


def our_model(size: Size, attention: str) -> LlamaForCausalLM:
    """In fp32, in host memory."""
    device = Device(size.device, capability_of(torch.device(size.device)))
    choice = resolve_attention_backend(attention, device, Demands(sixteen_bit=True))
    return build_model(size.model, choice.backend, seed=1)


def transformers_deepspeed(size: Size) -> OneStep:
    """transformers' LlamaForCausalLM under the same DeepSpeed JSON, with its own loss."""
    import deepspeed

    from tinyllama_ds.distributed.world import read_world
    from tinyllama_ds.hf.convert import hf_model
    from tinyllama_ds.train.engine import start_process_group

    start_process_group(read_world())
    model = hf_model(dict(our_model(size, "sdpa").state_dict()), size.model).train()
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=deepspeed_config("zero3_keep", size)
    )
    return deepspeed_step(size, engine, lambda inputs, labels: engine(input_ids=inputs, labels=inputs).loss)


def deepspeed_step(size: Size, engine, loss_of: Callable) -> OneStep:  # type: ignore[no-untyped-def]
    """All micro-batches of a step, and DeepSpeed's step."""

    def step() -> None:
        for number in range(size.accumulation):
            engine.set_gradient_accumulation_boundary(number == size.accumulation - 1)
            engine.backward(loss_of(*batch(size)) / size.accumulation, scale_wrt_gas=False)
        engine.step()

    return step


def fsdp2(size: Size, attention: str) -> OneStep:
    """PyTorch's fully_shard around our model, blocks compiled, bf16 compute and fp32 reduction."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo" if size.device == "cpu" else "nccl")
    model = our_model(size, attention).to(size.device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        layer.compile()
        fully_shard(layer, mp_policy=policy)
    sharded = fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        for number in range(size.accumulation):
            sharded.set_requires_gradient_sync(number == size.accumulation - 1)
            (model(*batch(size)) / size.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(size: Size, attention: str) -> OneStep:
    """Our model in a plain loop, blocks compiled."""
    model = our_model(size, attention).to(size.device)
    for layer in model.model.layers:
        layer.compile()
    return plain_loop(size, model, model)


def litgpt(size: Size) -> OneStep:
    """litgpt's model of the same shape in the same plain loop, compiled as a whole, with its own chunked loss."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape = size.model
    config = Config(
        block_size=size.sequence_length, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_hidden_layers, n_head=shape.num_attention_heads, n_embd=shape.hidden_size,
        n_query_groups=shape.num_key_value_heads, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=shape.intermediate_size,
    )  # fmt: skip
    model = GPT(config).to(size.device)
    forward = torch.compile(model)
    return plain_loop(size, model, lambda inputs, labels: chunked_cross_entropy(forward(inputs), labels))


def plain_loop(size: Size, model: torch.nn.Module, loss_of: Callable) -> OneStep:
    """One process and all threads: bf16 weights with fp32 masters, all micro-batches of the step."""
    masters = copy.deepcopy(model)
    model.bfloat16()
    optimizer = torch.optim.AdamW(masters.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))

    def step() -> None:
        for _ in range(size.accumulation * size.ranks):
            (loss_of(*batch(size)) / size.accumulation / size.ranks).backward()
            for master, weight in pairs:
                assert weight.grad is not None
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


def batch(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh random tokens: inputs and labels (B, T)."""
    tokens = torch.randint(size.model.vocab_size, (size.micro_batch, size.sequence_length + 1), device=size.device)
    return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True)
class Kind:
    """How a contender is made; `is_one_process` where it is one process on whatever number of ranks' share of cores.

    `package` is what it needs beyond our own dependencies.
    """

    build: Callable[[Size], OneStep]
    is_one_process: bool = False
    package: str | None = None


CONTENDERS = {
    "ours, ZeRO-3": Kind(lambda size: ours(size, "zero3_keep")),
    "ours, ZeRO-3, weights released": Kind(lambda size: ours(size, "zero3")),
    "ours, ZeRO-1": Kind(lambda size: ours(size, "zero1")),
    "ours, ZeRO-3, sdpa": Kind(lambda size: ours(size, "zero3_keep", "sdpa")),
    "transformers + DeepSpeed ZeRO-3": Kind(transformers_deepspeed),
    "FSDP2, compiled, sdpa": Kind(lambda size: fsdp2(size, "sdpa")),
    "FSDP2, compiled, our attention": Kind(lambda size: fsdp2(size, "auto")),
    "plain loop, compiled, sdpa": Kind(lambda size: plain(size, "sdpa"), is_one_process=True),
    "plain loop, compiled, our attention": Kind(lambda size: plain(size, "auto"), is_one_process=True),
    "plain loop, litgpt's model, compiled": Kind(litgpt, is_one_process=True, package="litgpt"),
}


def ranks_of(name: str, size: Size) -> int:
    """Processes of a contender."""
    return 1 if CONTENDERS[name].is_one_process else size.ranks
