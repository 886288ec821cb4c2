"""DeepSpeed's JSON: refuses unknown and removed keys, fills "auto", and checks it against the recipe.

DeepSpeed itself ignores an unknown key at the top level: `"gradient_cliping": 0.5` would train with the default.
The tables below are those of DeepSpeed 0.19.8; a test compares them with the installed version.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.errors import Refusal

_ZERO_KEYS = """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint
    offload_param offload_optimizer zenflow sub_group_size stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
    stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold
    stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters legacy_stage1
    round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
    override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory
    leaf_module"""

# Keys by section; "" is the top level. Sections that are not listed are DeepSpeed's own to check.
KNOWN_KEYS: dict[str, frozenset[str]] = {
    section: frozenset(keys.split())
    for section, keys in {
        "": """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler
            gradient_clipping bf16 fp16 torch_autocast zero_optimization data_types communication_data_type
            seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
            zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown
            memory_breakdown dump_state disable_allgather disable_python_gc dataloader_drop_last log_level checkpoint
            tensorboard wandb comet csv_monitor comms_logger flops_profiler timers aio compile activation_checkpointing
            managed_gradient_accumulation""",
        "optimizer": "type params",
        "scheduler": "type params",
        "scheduler.params": "total_num_steps warmup_num_steps warmup_min_ratio warmup_type cos_min_ratio",
        "zero_optimization": _ZERO_KEYS,
        "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
        "zero_optimization.offload_optimizer": """device nvme_path buffer_count pin_memory pipeline_read pipeline_write
            fast_init ratio super_offload cpuadam_cores_perc""",
        "zero_optimization.leaf_module": "classes names name_suffixes",
        "bf16": """enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads
            bf16_optimizer_states""",
        "fp16": """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
            min_loss_scale fp16_master_weights_and_grads""",
        "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
        "tensorboard": "enabled output_path job_name",
        "csv_monitor": "enabled output_path job_name",
        "wandb": "enabled group team project",
        "comet": """enabled samples_log_interval project workspace api_key experiment_name experiment_key online
            mode""",
    }.items()
}

_ADAM_PARAMS = frozenset({"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "fused", "foreach",
                          "bias_correction", "amsgrad", "fp32_optimizer_states"})  # fmt: skip

_GONE = "was removed from DeepSpeed 0.19"
REMOVED_KEYS: dict[str, str] = {
    "nebula": f"{_GONE}; checkpoints are written by tinyllama_ds itself",
    "compression_training": f"{_GONE} with the compression library",
    "amp": f"{_GONE} with NVIDIA Apex; use bf16",
    "quantize_training": f"{_GONE} with mixture of quantization",
    "sparse_gradients": f"{_GONE}; nothing replaces it",
    "eigenvalue": f"{_GONE} with mixture of quantization",
    "sparse_attention": f"{_GONE}; attention is the model's own",
    "elasticity": f"{_GONE}; the global batch is the recipe's and accumulation adapts by itself",
    "graph_harvesting": f"{_GONE}; nothing replaces it",
    "curriculum_learning": f"{_GONE}; stages belong to the recipe",
    "progressive_layer_drop": f"{_GONE}; nothing replaces it",
    "zero_optimization.mics_shard_size": f"{_GONE} with MiCS; see zero_hpz_partition_size or ZeRO-1/2",
    "zero_optimization.mics_hierarchical_params_gather": f"{_GONE} with MiCS",
    "zero_optimization.zeropp_loco_param": f"{_GONE} with LoCo",
    "zero_optimization.cpu_offload": "is deprecated; use offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "is deprecated; use offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "is deprecated; use pin_memory inside offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "is deprecated; export gathers by itself",
}

# TinyLlama's optimizer (paper section 2.4), for values left "auto".
_AUTO_OPTIMIZER = {"lr": 4e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
_MONITORS = ("tensorboard", "wandb", "comet", "csv_monitor")


@dataclass(frozen=True)
class ScheduleParams:
    """DeepSpeed's names for a linear warm-up and a cosine to a floor; ratios multiply the optimizer's learning rate.

    WarmupLR, which stays at the peak, is a floor of 1.
    """

    warmup_num_steps: int
    warmup_min_ratio: float
    cos_min_ratio: float


def load_deepspeed_config(path: Path) -> dict:
    """The JSON as it was written, every key known; raises `Refusal` naming the file and the key otherwise."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _no_twins(pairs, path))
    except FileNotFoundError as error:
        raise Refusal(f"{path}: the DeepSpeed config is missing") from error
    except ValueError as error:
        raise Refusal(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise Refusal(f"{path}: expected a JSON object at the top level")
    _check_keys(raw, "", path)
    _check_training(raw, path)
    return raw


def _no_twins(pairs: list[tuple[str, object]], path: Path) -> dict:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise Refusal(f"{path}: the key {key!r} is given twice in one section")
    return dict(pairs)


def _check_keys(section: dict, name: str, path: Path) -> None:
    for key, value in section.items():
        full = f"{name}.{key}" if name else key
        if full in REMOVED_KEYS:
            raise Refusal(f"{path}: {full} {REMOVED_KEYS[full]}")
        if name in KNOWN_KEYS and key not in KNOWN_KEYS[name]:
            close = difflib.get_close_matches(key, KNOWN_KEYS[name], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise Refusal(f"{path}: unknown key {full!r}{hint}")
        if full in KNOWN_KEYS and not isinstance(value, dict):
            raise Refusal(f"{path}: {full} is {value!r}; expected a section in braces")
        if isinstance(value, dict):
            _check_keys(value, full, path)


def _check_training(raw: dict, path: Path) -> None:
    """What this toolkit needs of a config beyond DeepSpeed's own rules."""
    optimizer = raw.get("optimizer")
    if optimizer is None or "type" not in optimizer:
        raise Refusal(f"{path}: optimizer.type is missing; expected for example AdamW")
    if optimizer["type"].lower() in ("adam", "adamw"):
        for key in optimizer.get("params", {}):
            if key not in _ADAM_PARAMS:
                close = difflib.get_close_matches(key, _ADAM_PARAMS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise Refusal(f"{path}: unknown key 'optimizer.params.{key}'{hint}")
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise Refusal(f"{path}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    if "activation_checkpointing" in raw:
        raise Refusal(
            f"{path}: activation_checkpointing would be ignored, DeepSpeed applies it to no model by itself;"
            " use pretrain --activation-checkpointing"
        )
    if raw.get("fp16", {}).get("enabled") is True:
        raise Refusal(f"{path}: fp16 is not supported; use bf16, which has the range of fp32")
    if raw.get("managed_gradient_accumulation") is False:
        raise Refusal(f"{path}: managed_gradient_accumulation must stay true; the training loop relies on it")
    read_schedule(raw, path)


def read_schedule(raw: dict, path: Path) -> ScheduleParams | None:
    """The learning-rate schedule of a config; None is a constant learning rate."""
    scheduler = raw.get("scheduler")
    if scheduler is None:
        return None
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    if kind not in ("WarmupCosineLR", "WarmupLR"):
        raise Refusal(f"{path}: scheduler.type is {kind!r}; expected WarmupCosineLR, WarmupLR or no scheduler")
    if params.get("warmup_type", "log") != "linear":
        raise Refusal(f"{path}: scheduler.params.warmup_type must be 'linear'; DeepSpeed's default would be 'log'")
    if kind == "WarmupLR":
        misplaced = ", ".join(sorted(params.keys() & {"cos_min_ratio", "total_num_steps"}))
        if misplaced:
            raise Refusal(f"{path}: scheduler.params.{misplaced} belongs to WarmupCosineLR; WarmupLR never falls")
        params = params | {"cos_min_ratio": 1.0}
    for key, default in (("warmup_num_steps", None), ("warmup_min_ratio", 0.0), ("cos_min_ratio", None)):
        value = params.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise Refusal(f"{path}: scheduler.params.{key} is {value!r}; expected a number of 0 or more")
    ratios = params.get("warmup_min_ratio", 0.0), params["cos_min_ratio"]
    if ratios[0] >= 1 or (ratios[1] >= 1 and kind == "WarmupCosineLR"):
        raise Refusal(
            f"{path}: warmup_min_ratio and cos_min_ratio are {ratios}; expected less than 1 of both, or WarmupLR for a"
            " rate that never falls"
        )
    return ScheduleParams(int(params["warmup_num_steps"]), float(ratios[0]), float(ratios[1]))


def resolve_deepspeed_config(
    raw: dict,
    path: Path,
    *,
    micro_batch: int,
    batch: int,
    world_size: int,
    total_steps: int,
    hidden_size: int,
    bf16: bool,
) -> dict:
    """The config with every "auto" filled, as users of Hugging Face's DeepSpeed integration expect.

    `batch` is the recipe's global batch in sequences. Raises `Refusal` for a value that the recipe owns and the JSON
    gives as well.
    """
    resolved = json.loads(json.dumps(raw))
    derived = {
        "train_batch_size": (batch, "global_batch_tokens"),
        "gradient_accumulation_steps": (batch // micro_batch // world_size, "global_batch_tokens"),
    }
    for key, (value, owner) in derived.items():
        _refuse_twins(path, key, resolved.get(key), f"the recipe's {owner}")
        resolved[key] = value
    resolved["train_micro_batch_size_per_gpu"] = micro_batch
    params = resolved["optimizer"].setdefault("params", {})
    _fill(params, _AUTO_OPTIMIZER)
    _fill(resolved, {"gradient_clipping": 1.0})
    if "bf16" in resolved:
        _fill(resolved["bf16"], {"enabled": bf16})
    if resolved.get("scheduler", {}).get("type") == "WarmupCosineLR":
        schedule = resolved["scheduler"]["params"]
        _refuse_twins(path, "scheduler.params.total_num_steps", schedule.get("total_num_steps"), "the recipe's tokens")
        schedule["total_num_steps"] = total_steps
    zero = resolved.setdefault("zero_optimization", {})
    _fill(
        zero,
        {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        },
    )
    _refuse_left_over_auto(resolved, "", path)
    _refuse_fp32_accumulation_at_stage_0(resolved, path)
    return resolved


def _refuse_fp32_accumulation_at_stage_0(resolved: dict, path: Path) -> None:
    stage, bf16 = resolved["zero_optimization"].get("stage", 0), resolved.get("bf16", {}).get("enabled")
    if stage == 0 and bf16 and resolved.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        raise Refusal(
            f"{path}: DeepSpeed cannot accumulate in fp32 at stage 0 with bf16; use stage 1 or drop data_types"
        )


def _refuse_twins(path: Path, key: str, value: object, owner: str) -> None:
    if value not in (None, "auto"):
        raise Refusal(f'{path}: {key} is {value}, but {owner} already decides it; write "auto" or leave it out')


def _fill(section: dict, values: dict) -> None:
    for key, value in values.items():
        if section.get(key) == "auto":
            section[key] = value


def _refuse_left_over_auto(section: dict, name: str, path: Path) -> None:
    for key, value in section.items():
        full = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            _refuse_left_over_auto(value, full, path)
        elif value == "auto" and key not in ("output_path", "job_name", "keep_in_fp32_modules"):
            raise Refusal(f'{path}: {full} is "auto", and nothing here knows how to fill it; expected a value')


def requested_micro_batch(raw: dict, path: Path) -> int | None:
    """The micro batch that the JSON asks for; None where it is "auto" or absent."""
    value = raw.get("train_micro_batch_size_per_gpu", "auto")
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refusal(f'{path}: train_micro_batch_size_per_gpu is {value!r}; expected a whole number or "auto"')
    return value


def computes_in_16_bit(resolved: dict) -> bool:
    """Whether matrix products and attention run in bf16 or fp16, and not in fp32."""
    return any(resolved.get(section, {}).get("enabled") is True for section in ("bf16", "torch_autocast"))


def weights_dtype(resolved: dict) -> str:
    """PyTorch's name of the dtype in which DeepSpeed keeps the weights that forward and backward use."""
    return "bfloat16" if resolved.get("bf16", {}).get("enabled") is True else "float32"


def split_off_our_sections(resolved: dict) -> tuple[dict, dict]:
    """(what DeepSpeed's engine gets, the monitor sections).

    The schedule is applied as a function of tokens by the training loop, and the monitors are fed with the loop's own
    figures; left inside, DeepSpeed would step a second schedule and write the next step's learning rate.
    """
    ours = ("scheduler", *_MONITORS)
    engine = {key: value for key, value in resolved.items() if key not in ours}
    return engine, {key: resolved[key] for key in _MONITORS if key in resolved}
