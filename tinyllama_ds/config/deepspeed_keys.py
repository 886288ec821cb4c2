"""Every key of DeepSpeed 0.19.8's JSON: supported, passed on with a warning, or rejected with what replaces it.

DeepSpeed ignores an unknown key at its top level, and has many that change nothing for this training loop. Here a key
is accepted only if it has its effect; docs/configs.md is made of these tables, and tests walk DeepSpeed's own classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
_ANY_STAGE = (0, 1, 2, 3)


@dataclass(frozen=True)
class Kind:
    """The values that a key may have, in words and as a predicate."""

    expectation: str
    accepts: Callable[[Any], bool]
    is_whole: bool = False  # an int, which JSON may write as 5e8


@dataclass(frozen=True)
class Key:
    """A key that is accepted: values, effect, the ZeRO stages where it has one, and whether "auto" is filled."""

    kind: Kind
    effect: str
    stages: tuple[int, ...] = _ANY_STAGE
    auto: bool = False

    @property
    def expectation(self) -> str:
        """What to write, as in "expected ..."."""
        return self.kind.expectation + (' or "auto"' if self.auto else "")

    @property
    def is_whole(self) -> bool:
        """Whether numbers are ints, however the JSON writes them."""
        return self.kind.is_whole

    def accepts(self, value: Any) -> bool:
        """Whether a value of the JSON has the type and the range."""
        return (self.auto and value == AUTO) or self.kind.accepts(value)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def _number(least: float = 0.0, below: float = math.inf, *, more_than: bool = False) -> Kind:
    low = f"more than {least:g}" if more_than else f"{least:g} or more"
    text = f"a number of {low}" + (f" and less than {below:g}" if below < math.inf else "")
    return Kind(text, lambda v: _is_number(v) and (v > least or (v == least and not more_than)) and v < below)


def _whole(least: int = 0, most: int = 2**62) -> Kind:
    text = f"a whole number of {least} or more" if most == 2**62 else f"a whole number from {least} to {most:,}"
    return Kind(text, lambda v: _is_number(v) and least <= v <= most and int(v) == v, True)


def _one_of(*values: Any) -> Kind:
    text = ", ".join(map(str, values[:-1])) + f" or {values[-1]}" if len(values) > 1 else str(values[0])
    # By type as well: True == 1 in Python.
    return Kind(text, lambda v: any(type(v) is type(value) and v == value for value in values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


_SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
_TEXT = Kind("a text", _is_text)
_NAMES = Kind("a list of names", lambda v: _is_list(v, _is_text))
_RATIO = Kind("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_BETAS = Kind(
    "two numbers of 0 or more and less than 1",
    lambda v: _is_list(v, lambda beta: _is_number(beta) and 0 <= beta < 1) and len(v) == 2,
)
_OPTIMIZER = Kind("AdamW, Adam or Muon", lambda v: isinstance(v, str) and v.lower() in ("adamw", "adam", "muon"))
_DTYPE = _one_of("fp32", "bf16")
_BY_RECIPE = Kind('"auto" or nothing, because the recipe decides it', lambda v: v == AUTO)
_OURS = "metrics are written by the training loop"

SUPPORTED: dict[str, Key] = {
    "train_batch_size": Key(_BY_RECIPE, "filled from the recipe's global_batch_tokens"),
    "train_micro_batch_size_per_gpu": Key(_whole(1, 65_536), "sequences of one forward pass of a rank", auto=True),
    "gradient_accumulation_steps": Key(_BY_RECIPE, "filled from global batch, micro-batch and ranks"),
    "gradient_clipping": Key(_number(), "the global gradient norm is clipped to it; 0 is off", auto=True),
    "communication_data_type": Key(_DTYPE, "the dtype in which gradients are reduced"),
    "prescale_gradients": Key(
        _SWITCH, "gradients are divided before their reduction; needs reduce_scatter: false", (0, 1, 2)
    ),
    "gradient_predivide_factor": Key(
        _number(more_than=True), "the part of that division before it; wrong at stage 3", (0, 1, 2)
    ),
    "wall_clock_breakdown": Key(_SWITCH, "DeepSpeed's milliseconds of forward, backward and step on the console"),
    "optimizer.type": Key(
        _OPTIMIZER,
        "others are not tested; Muon clips gradients at stage 1 in bf16 with fp32 accumulation only, and at stage 0",
    ),
    "optimizer.params.lr": Key(_number(), "peak learning rate", auto=True),
    "optimizer.params.betas": Key(_BETAS, "Adam's decay rates of its moments", auto=True),
    "optimizer.params.eps": Key(_number(), "Adam's epsilon", auto=True),
    "optimizer.params.weight_decay": Key(_number(), "weight decay of all parameters", auto=True),
    "optimizer.params.torch_adam": Key(_SWITCH, "PyTorch's Adam or AdamW; false is DeepSpeed's, compiled at first use"),
    "optimizer.params.fused": Key(_SWITCH, "PyTorch's fused kernel; needs torch_adam"),
    "optimizer.params.foreach": Key(_SWITCH, "PyTorch's loop over lists of tensors; needs torch_adam"),
    "optimizer.params.amsgrad": Key(_SWITCH, "AMSGrad's maximum of second moments; needs torch_adam"),
    "optimizer.params.adam_w_mode": Key(_SWITCH, "Adam: false is weight decay as L2 regularization"),
    "optimizer.params.muon_lr": Key(_number(), "Muon: learning rate of the matrices"),
    "optimizer.params.adam_lr": Key(_number(), "Muon: learning rate of all other parameters"),
    "optimizer.params.momentum": Key(_number(0, 1), "Muon: of the matrices"),
    "optimizer.params.ns_method": Key(_one_of("standard", "gram"), "Muon: form of its Newton-Schulz iteration"),
    "scheduler.type": Key(_one_of("WarmupCosineLR", "WarmupLR"), "applied as a function of tokens"),
    "scheduler.params.total_num_steps": Key(_BY_RECIPE, "filled from the recipe's tokens"),
    "scheduler.params.warmup_num_steps": Key(_whole(), "steps of the first stage's batch until the peak"),
    "scheduler.params.warmup_min_ratio": Key(_number(0, 1), "of the peak, where the warmup begins"),
    "scheduler.params.warmup_type": Key(_one_of("linear"), "DeepSpeed's default would be log"),
    "scheduler.params.cos_min_ratio": Key(_number(0, 1), "of the peak, where the cosine ends"),
    "bf16.enabled": Key(_SWITCH, "weights in bf16, master weights in fp32", auto=True),
    "bf16.immediate_grad_update": Key(_SWITCH, "gradients are accumulated in fp32 as they appear", (1,)),
    "bf16.check_grad_overflow": Key(
        _SWITCH, "false: a gradient that is not finite ends the run, where the step would be skipped", (1, 2)
    ),
    "bf16.bf16_master_weights_and_grads": Key(_SWITCH, "no fp32 master weights; with bf16_optimizer_states", (1, 2, 3)),
    "bf16.bf16_optimizer_states": Key(_SWITCH, "Adam's moments in bf16; needs the key above", (1, 2, 3)),
    "data_types.grad_accum_dtype": Key(_DTYPE, "gradients are accumulated in it; fp32 needs a stage above 0 in bf16"),
    "zero_optimization.stage": Key(_one_of(0, 1, 2, 3), "what is partitioned: 1 optimizer, 2 gradients, 3 weights too"),
    "zero_optimization.contiguous_gradients": Key(_SWITCH, "gradients are copied into one buffer", (1, 2, 3)),
    "zero_optimization.reduce_scatter": Key(_SWITCH, "false: all-reduce, which Muon needs at stage 3", (1, 2, 3)),
    "zero_optimization.reduce_bucket_size": Key(_whole(1), "elements of one reduction of gradients", (1, 2, 3), True),
    "zero_optimization.use_multi_rank_bucket_allreduce": Key(_SWITCH, "one reduction for buckets of all ranks", (1, 2)),
    "zero_optimization.allgather_partitions": Key(_SWITCH, "false: broadcasts in place of an all-gather", (1, 2)),
    "zero_optimization.allgather_bucket_size": Key(_whole(1), "elements of one all-gather of weights", (1, 2)),
    "zero_optimization.overlap_comm": Key(_SWITCH, "reductions run during the backward pass", (1, 2, 3)),
    "zero_optimization.round_robin_gradients": Key(_SWITCH, "gradients are distributed over ranks round robin", (1, 2)),
    "zero_optimization.parameter_alignment": Key(_SWITCH, "parameters start at multiples of 16 bytes", (1, 2)),
    "zero_optimization.sub_group_size": Key(_whole(1), "elements of one part of the optimizer's step", (3,)),
    "zero_optimization.stage3_prefetch_bucket_size": Key(_whole(), "elements gathered ahead of use", (3,), True),
    "zero_optimization.stage3_param_persistence_threshold": Key(
        _whole(), "smaller parameters are kept on every rank", (3,), True
    ),
    "zero_optimization.stage3_model_persistence_threshold": Key(_whole(), "elements that may stay in all", (3,)),
    "zero_optimization.stage3_max_live_parameters": Key(_whole(), "elements that stay gathered at most", (3,)),
    "zero_optimization.stage3_max_reuse_distance": Key(_whole(), "elements until the next use that stay", (3,)),
    "zero_optimization.stage3_module_granularity_threshold": Key(_whole(), "finer modules are gathered whole", (3,)),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": Key(_SWITCH, "weights by all-reduce", (3,)),
    "zero_optimization.stage3_allgather_sequential": Key(_SWITCH, "parameters one by one: less memory", (3,)),
    "zero_optimization.zero_hpz_partition_size": Key(_whole(1), "GPUs of a node, which keeps a second copy", (3,)),
    "zero_optimization.memory_efficient_linear": Key(_SWITCH, "linear layers keep no gathered weight", (3,)),
    "zero_optimization.enable_sanity_checks": Key(_SWITCH, "DeepSpeed's checks of its own bookkeeping", (3,)),
    "zero_optimization.leaf_module.classes": Key(_NAMES, "modules gathered whole; default: the blocks", (3,)),
    "zero_optimization.offload_optimizer.device": Key(
        _one_of("none", "cpu", "nvme"), "where optimizer states are, and where its step runs", (1, 2, 3)
    ),
    "zero_optimization.offload_optimizer.pin_memory": Key(_SWITCH, "page-locked host memory", (1, 2, 3)),
    "zero_optimization.offload_param.device": Key(_one_of("none", "cpu", "nvme"), "where weights rest", (3,)),
    "zero_optimization.offload_param.pin_memory": Key(_SWITCH, "page-locked host memory", (3,)),
    "tensorboard.enabled": Key(_SWITCH, _OURS),
    "tensorboard.output_path": Key(_TEXT, 'a directory; "auto" is the run directory'),
    "tensorboard.job_name": Key(_TEXT, 'a directory inside; "auto" is none'),
    "csv_monitor.enabled": Key(_SWITCH, _OURS),
    "csv_monitor.output_path": Key(_TEXT, 'a directory; "auto" is the run directory'),
    "csv_monitor.job_name": Key(_TEXT, 'a directory inside; "auto" is csv'),
}  # fmt: skip

_WEB = "metrics go to a web service, by its package; not tested here"
_NVME = "offloading to NVMe, which needs libaio and a local disk; not tested here"
WARNED: dict[str, Key] = {
    "wandb.enabled": Key(_SWITCH, _WEB),
    "wandb.group": Key(_TEXT, _WEB),
    "wandb.team": Key(_TEXT, _WEB),
    "wandb.project": Key(_TEXT, _WEB),
    "comet.enabled": Key(_SWITCH, _WEB),
    "comet.samples_log_interval": Key(_whole(1), _WEB),
    "comet.project": Key(_TEXT, _WEB),
    "comet.workspace": Key(_TEXT, _WEB),
    "comet.experiment_name": Key(_TEXT, _WEB),
    "comet.experiment_key": Key(_TEXT, _WEB),
    "comet.online": Key(_SWITCH, _WEB),
    "comet.mode": Key(_one_of("get", "create", "get_or_create"), _WEB),
    "zero_optimization.zero_quantized_weights": Key(
        _SWITCH, "weights are gathered in int8 by a CUDA kernel, which changes the loss; not tested here", (3,)
    ),
    "zero_optimization.zero_quantized_gradients": Key(
        _SWITCH, "gradients are reduced in int4 and int8 between nodes; on one node it has no effect", (3,)
    ),
    "zero_optimization.offload_optimizer.nvme_path": Key(_TEXT, _NVME, (3,)),
    "zero_optimization.offload_optimizer.buffer_count": Key(_whole(1), _NVME, (3,)),
    "zero_optimization.offload_optimizer.pipeline_read": Key(_SWITCH, _NVME, (3,)),
    "zero_optimization.offload_optimizer.pipeline_write": Key(_SWITCH, _NVME, (3,)),
    "zero_optimization.offload_optimizer.fast_init": Key(_SWITCH, _NVME, (3,)),
    "zero_optimization.offload_optimizer.ratio": Key(
        _RATIO, "the part that is offloaded, by DeepSpeed's CPUAdam, which this machine has to compile", (3,)
    ),
    "zero_optimization.offload_optimizer.super_offload": Key(
        _SWITCH, "offloading tuned for GH200, with CUDA only; not tested here", (3,)
    ),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": Key(_RATIO, "the CPU cores of super_offload", (3,)),
    "zero_optimization.offload_param.nvme_path": Key(_TEXT, _NVME, (3,)),
    "zero_optimization.offload_param.buffer_count": Key(_whole(1), _NVME, (3,)),
    "zero_optimization.offload_param.buffer_size": Key(_whole(1), _NVME, (3,)),
    "zero_optimization.offload_param.max_in_cpu": Key(_whole(), _NVME, (3,)),
    "zero_optimization.save_muon_momentum_buffer_in_memory": Key(
        _SWITCH, "Muon's momentum stays out of NVMe; not tested here", (3,)
    ),
    "aio.block_size": Key(_whole(1), _NVME),
    "aio.queue_depth": Key(_whole(1), _NVME),
    "aio.intra_op_parallelism": Key(_whole(1), _NVME),
    "aio.single_submit": Key(_SWITCH, _NVME),
    "aio.overlap_events": Key(_SWITCH, _NVME),
    "aio.use_gds": Key(_SWITCH, _NVME),
}  # fmt: skip

_GONE = "was removed from DeepSpeed 0.19"
_DEPRECATED = "is deprecated in DeepSpeed"
_MUTED = "has no effect, because DeepSpeed's own log lines are not shown"
_OWN_CHECKPOINTS = "has no effect, because checkpoints are written by tinyllama_ds itself"
_NOT_HERE = "is for models that are not trained here"
# A section that is rejected takes its keys with it.
REJECTED: dict[str, str] = {
    "nebula": f"{_GONE}; checkpoints are written by tinyllama_ds itself",
    "compression_training": f"{_GONE} with the compression library",
    "amp": f"{_GONE} with NVIDIA Apex; use bf16",
    "quantize_training": f"{_GONE} with mixture of quantization",
    "sparse_gradients": f"{_GONE}; nothing replaces it",
    "eigenvalue": f"{_GONE} with mixture of quantization",
    "sparse_attention": f"{_GONE}; attention is the model's own",
    "elasticity": f"{_GONE}; the global batch is the recipe's and accumulation adapts by itself",
    "graph_harvesting": f"{_GONE}; nothing replaces it",
    "curriculum_learning": f"{_GONE}; use stages of the recipe",
    "progressive_layer_drop": f"{_GONE}; nothing replaces it",
    "fp16": "is not supported; use bf16, which has the range of fp32",
    "bfloat16": f"{_DEPRECATED}; use bf16",
    "torch_autocast": "is not supported; use bf16, which keeps fp32 master weights as well",
    "seq_parallel_communication_data_type": "has no effect without sequence parallelism",
    "gradient_allreduce_op": "would multiply gradients by the number of ranks with 'sum', and 'mean' is the default",
    "zero_allow_untested_optimizer": "has no effect, because no untested optimizer is accepted",
    "zero_force_ds_cpu_optimizer": "has no effect, because DeepSpeed asks for it with optimizers from outside only",
    "steps_per_print": f"{_MUTED}; use log_steps of the recipe",
    "memory_breakdown": f"{_MUTED}; use tinyllama-ds bench",
    "dump_state": f"{_MUTED}; run.json of the run directory holds the resolved config",
    "log_level": f"{_MUTED}; remove it",
    "comms_logger": f"{_MUTED}; use tinyllama-ds bench, which measures communication",
    "flops_profiler": "miscounts the model's own autograd functions; use tinyllama-ds bench, or MFU on the console",
    "timers": "would only wait for the GPU at every micro-batch; the training loop measures itself",
    "autotuning": "belongs to DeepSpeed's own launcher; use tinyllama-ds plan --search and bench",
    "disable_allgather": "has no effect in DeepSpeed 0.19; use zero_optimization.allgather_partitions",
    "disable_python_gc": "has no effect, because the training loop freezes what Python's collector would look at",
    "dataloader_drop_last": "has no effect, because data is read by tinyllama_ds itself",
    "data_efficiency": "has no effect, because data is read by tinyllama_ds itself; use stages of the recipe",
    "checkpoint": f"{_OWN_CHECKPOINTS}; use save_tokens of the recipe",
    "datastates_ckpt": f"{_OWN_CHECKPOINTS}; use save_tokens of the recipe",
    "activation_checkpointing": (
        "would be ignored, because DeepSpeed does not apply it by itself; use pretrain --activation-checkpointing"
    ),
    "compile": "has no effect without engine.compile(); use pretrain --compile, which compiles the decoder's blocks",
    "managed_gradient_accumulation": "must stay true, because the training loop relies on it; remove it",
    "tensor_parallel": "is not supported; use zero_optimization, whose partitions any model of this size fits",
    "sequence_parallel_size": "is not supported; use a smaller micro-batch or pretrain --activation-checkpointing",
    "pipeline": "is not supported; use zero_optimization",
    "hybrid_engine": f"{_NOT_HERE} (reinforcement learning with generation)",
    "expert_parallel": f"{_NOT_HERE} (mixture of experts)",
    "use_data_before_expert_parallelism": f"{_NOT_HERE} (mixture of experts)",
    "vocabulary_size": "has no effect on training; the model's own is used",
    "weight_quantization": f"{_NOT_HERE} (inference)",
    "optimizer.legacy_fusion": "has no effect without fp16",
    "optimizer.params.max_grad_norm": "is not an optimizer's in DeepSpeed; use gradient_clipping",
    "optimizer.params.bias_correction": "is not supported; it is always on, as in PyTorch",
    "optimizer.params.fp32_optimizer_states": "is not supported; use bf16.bf16_optimizer_states",
    "data_types.param_dtype": "repeats bf16.enabled; use that",
    "data_types.buffer_dtype": "has no effect, because the model has no buffers that are cast",
    "data_types.keep_in_fp32_modules": "has no effect, because DeepSpeed keeps buffers only, and the model has none",
    "comet.api_key": "is a secret, and this file is recorded with the run; use the variable COMET_API_KEY",
    "zero_optimization.mics_shard_size": f"{_GONE} with MiCS; use zero_hpz_partition_size or stage 1 or 2",
    "zero_optimization.mics_hierarchical_params_gather": f"{_GONE} with MiCS",
    "zero_optimization.zeropp_loco_param": f"{_GONE} with LoCo",
    "zero_optimization.cpu_offload": f"{_DEPRECATED}; use offload_optimizer: {{device: cpu}}",
    "zero_optimization.cpu_offload_param": f"{_DEPRECATED}; use offload_param: {{device: cpu}}",
    "zero_optimization.cpu_offload_use_pin_memory": f"{_DEPRECATED}; use pin_memory inside offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": f"{_DEPRECATED}; export gathers by itself",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "has no effect, because export gathers by itself",
    "zero_optimization.leaf_module.names": "is not supported, as all blocks are alike; use leaf_module.classes",
    "zero_optimization.leaf_module.name_suffixes": "is not supported, as all blocks are alike; use leaf_module.classes",
    "zero_optimization.zenflow": "would change the global batch and apply gradients late; use offload_optimizer",
    "zero_optimization.compute_grad_norm": "must stay true, because the training loop looks at the norm; remove it",
    "zero_optimization.load_from_fp32_weights": "must stay true, or a resumed run would round its master weights",
    "zero_optimization.elastic_checkpoint": f"{_OWN_CHECKPOINTS}, which any number of ranks loads",
    "zero_optimization.ignore_unused_parameters": "has no effect, because the model uses all its parameters",
    "zero_optimization.legacy_stage1": f"{_GONE}; remove it",
    "zero_optimization.zero_quantized_nontrainable_weights": "has no effect, because all weights are trained",
    "zero_optimization.override_module_apply": "has no effect, because the model is built before DeepSpeed has it",
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.log_trace_cache_warnings": f"{_MUTED}; remove it",
}


# Of the rejected keys those that DeepSpeed has on: false is what would change something.
_ON_BY_DEFAULT = (
    "managed_gradient_accumulation", "timers", "zero_force_ds_cpu_optimizer",
    "optimizer.params.bias_correction", "zero_optimization.compute_grad_norm",
    "zero_optimization.load_from_fp32_weights", "zero_optimization.ignore_unused_parameters",
    "zero_optimization.override_module_apply",
)  # fmt: skip
# Parameters of some optimizers only.
OPTIMIZER_PARAMS: dict[str, tuple[str, ...]] = {
    "muon_lr": ("muon",), "adam_lr": ("muon",), "momentum": ("muon",), "ns_method": ("muon",),
    "fused": ("adamw", "adam"), "foreach": ("adamw", "adam"), "amsgrad": ("adamw", "adam"), "adam_w_mode": ("adam",),
}  # fmt: skip


def is_off(full: str, value: Any) -> bool:
    """Whether a rejected key is switched off, as other programs' files have it: false, or a section with `"enabled":
    false`.
    """
    off = value is False or (isinstance(value, dict) and value.get("enabled") is False)
    return off and full not in _ON_BY_DEFAULT


ACCEPTED = SUPPORTED | WARNED
SECTIONS = frozenset(full[:place] for full in ACCEPTED for place, sign in enumerate(full) if sign == ".")
KNOWN = (*ACCEPTED, *SECTIONS)
