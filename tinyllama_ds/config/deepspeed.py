"""DeepSpeed's JSON: refuses what has no effect, fills "auto", and checks it against the recipe.

Which keys there are, and the values that they may have, is in `deepspeed_keys`.
"""

import copy
import difflib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.config.deepspeed_keys import ACCEPTED, AUTO, OPTIMIZER_PARAMS, REJECTED, SECTIONS, WARNED, is_off
from tinyllama_ds.config.run_plan import accumulation_steps
from tinyllama_ds.errors import ConfigError, raise_problems, shown
from tinyllama_ds.inputs import read_text

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
    """The JSON as it was written, every key and value checked.

    Raises `ConfigError` that names the file and every problem in it, each with its key in full, value and expectation.
    """
    text = read_text(path, "the DeepSpeed config")
    try:
        raw = json.loads(text, object_pairs_hook=lambda pairs: _reject_duplicate_keys(pairs, path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object at the top level")
    raise_problems(path, _problems(raw, "") or _problems_together(raw))
    read_schedule(raw, path)
    return raw


def _reject_duplicate_keys(pairs: list[tuple[str, object]], path: Path) -> dict:
    keys = [key for key, _ in pairs]
    for key, count in Counter(keys).items():
        if count > 1:
            raise ConfigError(f"{path}: the key {shown(key)} is given twice in one section")
    return dict(pairs)


def _problems(section: dict, name: str) -> list[str]:
    """What is wrong with keys and values, each for itself."""
    found = []
    for key, value in section.items():
        full = f"{name}.{key}" if name else key
        if full in REJECTED:
            found += [] if is_off(full, value) else [f"{full} {REJECTED[full]}"]
        elif full in SECTIONS:
            found += (
                _problems(value, full) if isinstance(value, dict) else [_expected(full, value, "a section in braces")]
            )
        elif full not in ACCEPTED:
            found.append(f"unknown key {shown(full)}{_hint(key, name)}")
        elif not ACCEPTED[full].accepts(value):
            found.append(_expected(full, value, ACCEPTED[full].expectation))
    return found


def _expected(full: str, value: object, expectation: str) -> str:
    return f"{full} is {_in_json(value)}; expected {expectation}"


def _in_json(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _hint(key: str, section: str) -> str:
    """The key of the section that is spelt nearly so, or the section that has the key."""
    known = {full for full in (*ACCEPTED, *SECTIONS) if full.rpartition(".")[0] == section}
    names = {full.rpartition(".")[2]: full for full in known}
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    elsewhere = sorted(full for full in ACCEPTED if full.rpartition(".")[2] == key)
    if close:
        return f"; did you mean {names[close[0]]!r}?"
    return f"; did you mean {elsewhere[0]!r}?" if len(elsewhere) == 1 else ""


def _problems_together(raw: dict) -> list[str]:
    """What is wrong with keys that are right each for itself: DeepSpeed would stop later, or train something else."""
    zero, bf16 = raw.get("zero_optimization", {}), raw.get("bf16", {})
    stage = zero.get("stage", 0)
    found = _problems_of_optimizer(raw)
    if bf16.get("bf16_master_weights_and_grads", False) != bf16.get("bf16_optimizer_states", False):
        found.append(
            "bf16.bf16_master_weights_and_grads and bf16.bf16_optimizer_states differ; expected both or neither"
        )
    elif bf16.get("bf16_optimizer_states") and stage == 0:
        found.append("bf16.bf16_optimizer_states has no effect at zero_optimization.stage 0; expected 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        section = zero.get(part, {})
        if section.get("device") == "nvme" and not section.get("nvme_path"):
            found.append(f"zero_optimization.{part}.nvme_path is missing; expected a directory of a local disk")
    if stage == 3 and raw.get("gradient_predivide_factor", 1.0) != 1.0:
        found.append("gradient_predivide_factor makes gradients too small at zero_optimization.stage 3; leave it out")
    return found


def _problems_of_optimizer(raw: dict) -> list[str]:
    optimizer, zero = raw.get("optimizer", {}), raw.get("zero_optimization", {})
    if "type" not in optimizer:
        return ["optimizer.type is missing; expected AdamW, Adam or Muon"]
    kind, stage = optimizer["type"].lower(), zero.get("stage", 0)
    found = [
        f"optimizer.params.{key} has no effect with {optimizer['type']}; leave it out"
        for key in optimizer.get("params", {})
        if kind not in OPTIMIZER_PARAMS.get(key, (kind,))
    ]
    if kind == "muon" and stage == 3 and zero.get("reduce_scatter", True):
        found.append("optimizer.type Muon at stage 3 needs zero_optimization.reduce_scatter: false")
    return found


def warnings_of(raw: dict) -> list[str]:
    """What a checked config asks for that may have no effect, a sentence for each key."""
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    return [sentence for full, value in _leaves(raw, "") if (sentence := _warning_of(full, value, stage))]


def _leaves(section: dict, name: str) -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        full = f"{name}.{key}" if name else key
        if full in SECTIONS:
            yield from _leaves(value, full)
        elif full in ACCEPTED:
            yield full, value


def _warning_of(full: str, value: object, stage: int) -> str | None:
    if stage not in ACCEPTED[full].stages:
        stages = ", ".join(map(str, ACCEPTED[full].stages))
        return f"{full} has no effect at zero_optimization.stage {stage}, only at {stages}"
    return f"{full}: {WARNED[full].effect}" if full in WARNED and value not in (False, "") else None


def read_schedule(raw: dict, path: Path) -> ScheduleParams | None:
    """The learning-rate schedule of a config; None is a constant learning rate."""
    scheduler = raw.get("scheduler")
    if scheduler is None:
        return None
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    if kind is None:
        raise ConfigError(f"{path}: scheduler.type is missing; expected WarmupCosineLR, WarmupLR or no scheduler")
    if "warmup_type" not in params:
        raise ConfigError(
            f"{path}: scheduler.params.warmup_type is missing; expected linear, DeepSpeed's default is log"
        )
    misplaced = ", ".join(sorted(params.keys() & {"cos_min_ratio", "total_num_steps"}))
    if kind == "WarmupLR" and misplaced:
        raise ConfigError(f"{path}: scheduler.params.{misplaced} belongs to WarmupCosineLR; WarmupLR never falls")
    needed = ("warmup_num_steps",) if kind == "WarmupLR" else ("warmup_num_steps", "cos_min_ratio")
    raise_problems(
        path,
        [
            f"scheduler.params.{key} is missing; expected {ACCEPTED[f'scheduler.params.{key}'].expectation}"
            for key in needed
            if key not in params
        ],
    )
    return ScheduleParams(
        int(params["warmup_num_steps"]),
        float(params.get("warmup_min_ratio", 0.0)),
        float(params.get("cos_min_ratio", 1)),
    )


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

    `batch` is the recipe's global batch in sequences. What is rejected and off is left out, and a whole number is an
    int however it was written. Raises `ConfigError` for what DeepSpeed cannot do with these values.
    """
    resolved = _normalize(raw, "")
    resolved["train_batch_size"] = batch
    resolved["gradient_accumulation_steps"] = accumulation_steps(batch, world_size, micro_batch)
    resolved["train_micro_batch_size_per_gpu"] = micro_batch
    params = resolved["optimizer"].setdefault("params", {})
    _fill(params, _AUTO_OPTIMIZER)
    _fill(resolved, {"gradient_clipping": 1.0})
    if "bf16" in resolved:
        _fill(resolved["bf16"], {"enabled": bf16})
    if resolved.get("scheduler", {}).get("type") == "WarmupCosineLR":
        resolved["scheduler"]["params"]["total_num_steps"] = total_steps
    zero = resolved.setdefault("zero_optimization", {})
    _fill(
        zero,
        {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        },
    )
    raise_problems(path, _problems_of_precision(resolved))
    return resolved


def _normalize(section: dict, name: str) -> dict:
    found: dict = {}
    for key, value in section.items():
        full = f"{name}.{key}" if name else key
        if full in SECTIONS:
            found[key] = _normalize(value, full)
        elif full in ACCEPTED:
            is_whole = isinstance(value, float) and ACCEPTED[full].is_whole
            found[key] = int(value) if is_whole else copy.deepcopy(value)
    return found


def _problems_of_precision(resolved: dict) -> list[str]:
    """What is wrong only if weights are in bf16, or only if they are not."""
    stage, bf16 = resolved["zero_optimization"].get("stage", 0), computes_in_16_bit(resolved)
    in_fp32 = resolved.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    found = []
    if stage == 0 and bf16 and in_fp32:
        found.append("DeepSpeed cannot accumulate in fp32 at stage 0 with bf16; use stage 1 or drop data_types")
    # But for its bf16 optimizer of stage 1, DeepSpeed has orthogonalized the gradients before it clips them.
    offloads = resolved["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    clips_gradients = stage == 0 or (stage == 1 and bf16 and in_fp32 and not offloads)
    if resolved["optimizer"]["type"].lower() == "muon" and resolved.get("gradient_clipping") and not clips_gradients:
        found.append(
            "gradient_clipping would clip what Muon makes of the gradients; expected 0, or zero_optimization.stage 1"
            " with bf16 and data_types.grad_accum_dtype: fp32"
        )
    return found


def _fill(section: dict, values: dict) -> None:
    for key, value in values.items():
        if section.get(key) == "auto":
            section[key] = value


def requested_micro_batch(raw: dict) -> int | None:
    """The micro batch that the JSON asks for; None where it is "auto" or absent."""
    value = raw.get("train_micro_batch_size_per_gpu", AUTO)
    return None if value == AUTO else int(value)


def computes_in_16_bit(resolved: dict) -> bool:
    """Whether matrix products and attention run in bf16, and not in fp32."""
    return resolved.get("bf16", {}).get("enabled") is True


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
