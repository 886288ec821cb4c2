"""DeepSpeed's JSON: rejects what has no effect, fills "auto", and checks it against the recipe.

Which keys there are, and the values that they may have, is in `deepspeed_keys.toml`.
"""

import copy
import difflib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama_ds.config import param_groups
from tinyllama_ds.config.deepspeed_keys import AUTO, key_tables
from tinyllama_ds.config.key_lines import json_lines
from tinyllama_ds.config.run_plan import accumulation_steps
from tinyllama_ds.config.validation import with_line
from tinyllama_ds.errors import ConfigError, raise_problems, shown, shown_as_json
from tinyllama_ds.inputs import read_text

# TinyLlama's optimizer (paper section 2.4), for values left "auto".
_AUTO_OPTIMIZER = {"lr": 4e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
_WARMUP_SHARE = 2_000 / 1_430_512  # TinyLlama's steps of warmup, and all of its steps
_MONITORS = ("tensorboard", "wandb", "comet", "csv_monitor")


def load_deepspeed_config(path: Path) -> dict:
    """The JSON as it was written, every key and value checked.

    Raises `ConfigError` with every problem of the file, each with its line, key in full, value and expectation.
    """
    text = read_text(path, "the DeepSpeed config")
    try:
        raw = json.loads(text, object_pairs_hook=lambda pairs: _reject_duplicate_keys(pairs, path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object at the top level")
    flat, lines = flatten(raw), json_lines(text)
    problems = [with_line(tuple(full.split(".")), sentence, lines) for full, sentence in _problems(flat)]
    if param_groups.KEY in flat and not problems:
        problems = param_groups.problems_of(flat[param_groups.KEY], lines)
    raise_problems(path, problems or _problems_together(flat))
    return raw


def flatten(section: dict, name: str = "") -> dict[str, Any]:
    """Every value by its key in full, such as `optimizer.params.lr`; empty sections and rejected ones as they are."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        full = f"{name}{json.dumps(key) if '.' in key else key}"
        if full in key_tables().sections and isinstance(value, dict) and value:
            flat |= flatten(value, f"{full}.")
        else:
            flat[full] = value
    return flat


def _reject_duplicate_keys(pairs: list[tuple[str, object]], path: Path) -> dict:
    keys = [key for key, _ in pairs]
    for key, count in Counter(keys).items():
        if count > 1:
            raise ConfigError(f"{path}: the key {shown(key)} is given twice in one section")
    return dict(pairs)


def _problems(flat: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with single keys and values: each key in full, and a sentence."""
    keys = key_tables()
    for full, value in flat.items():
        if full in keys.rejected:
            if not keys.is_off(full, value):
                yield full, f"{full} {keys.rejected[full]}"
        elif full in keys.sections:
            if not isinstance(value, dict):
                yield full, _expected(full, value, "a section in braces")
        elif full not in keys.accepted:
            yield full, f"unknown key {shown(full)}{_hint(full)}"
        elif not keys.accepted[full].accepts(value):
            key = keys.accepted[full]
            yield full, _expected(full, value, key.expectation, key.why_not(value))


def _expected(full: str, value: object, expectation: str, why_not: str = "") -> str:
    return f"{full} is {shown_as_json(value)}{', which ' if why_not else ''}{why_not}; expected {expectation}"


def _hint(full: str) -> str:
    """The key of the section with the nearest spelling, or the section that has the key."""
    section, _, key = full.rpartition(".")
    keys = key_tables()
    known_keys = (*keys.accepted, *keys.sections)
    names = {known.rpartition(".")[2]: known for known in known_keys if known.rpartition(".")[0] == section}
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    elsewhere = sorted(known for known in keys.accepted if known.rpartition(".")[2] == key)
    if close:
        return f"; did you mean {names[close[0]]!r}?"
    return f"; did you mean {elsewhere[0]!r}?" if len(elsewhere) == 1 else ""


def _problems_together(flat: dict[str, Any]) -> list[str]:
    """What is wrong with keys that are valid by themselves: DeepSpeed would stop later, or train differently."""
    stage = flat.get("zero_optimization.stage", 0)
    states_in_bf16 = flat.get("bf16.bf16_optimizer_states", False)
    found = _problems_of_optimizer(flat, stage) + _problems_of_scheduler(flat)
    if flat.get("bf16.bf16_master_weights_and_grads", False) != states_in_bf16:
        found.append(
            "bf16.bf16_master_weights_and_grads and bf16.bf16_optimizer_states differ; expected both or neither"
        )
    elif states_in_bf16 and stage == 0:
        found.append("bf16.bf16_optimizer_states has no effect at zero_optimization.stage 0; expected 1, 2 or 3")
    for part in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if flat.get(f"{part}.device") == "nvme" and not flat.get(f"{part}.nvme_path"):
            found.append(f"{part}.nvme_path is missing; expected a directory of a local disk")
    if stage == 3 and flat.get("gradient_predivide_factor", 1.0) != 1.0:
        found.append("gradient_predivide_factor makes gradients too small at zero_optimization.stage 3; remove it")
    return found


def _problems_of_optimizer(flat: dict[str, Any], stage: int) -> list[str]:
    keys = key_tables().accepted
    if "optimizer.type" not in flat:
        return [f"optimizer.type is missing; expected {keys['optimizer.type'].expectation}"]
    kind = flat["optimizer.type"].lower()
    found = [
        f"{full} has no effect with {flat['optimizer.type']}; remove it"
        for full in flat
        if full in keys and keys[full].optimizers and kind not in keys[full].optimizers
    ]
    # With it DeepSpeed does not start at stage 3. At stage 2 in bf16, accumulating in fp32, it drops the gradients of
    # parameters that are followed by a matrix: stage_1_and_2.py, average_tensor, merges the two and forgets the target.
    if kind == "muon" and stage > 1 and flat.get("zero_optimization.reduce_scatter", True):
        found.append(f"optimizer.type Muon at stage {stage} needs zero_optimization.reduce_scatter: false")
    return found


def _problems_of_scheduler(flat: dict[str, Any]) -> list[str]:
    """Of the parameters that its type needs, and those that it does not have."""
    if not any(full.startswith("scheduler") for full in flat):
        return []
    kind, keys = flat.get("scheduler.type"), key_tables().accepted
    if kind is None:
        return [f"scheduler.type is missing; expected {keys['scheduler.type'].expectation}, or no scheduler"]
    params = {full: key for full, key in keys.items() if key.schedulers}
    return [
        f"{full} is missing; expected {key.expectation}"
        for full, key in params.items()
        if kind in key.required_by and full not in flat
    ] + [
        f"{full} has no effect with {kind}, only with {', '.join(params[full].schedulers)}; remove it"
        for full in flat
        if full in params and kind not in params[full].schedulers
    ]


def warnings_of(raw: dict) -> list[str]:
    """What a checked config asks for that may have no effect, a sentence for each key."""
    flat = flatten(raw)
    keys, stage = key_tables(), flat.get("zero_optimization.stage", 0)
    sentences = []
    for full, value in flat.items():
        stages = keys.accepted[full].stages if full in keys.accepted else (stage,)
        if stage not in stages:
            only = ", ".join(map(str, stages))
            sentences.append(f"{full} has no effect at zero_optimization.stage {stage}, only at {only}")
        elif full in keys.warned and value not in (False, ""):
            sentences.append(f"{full}: {keys.warned[full].effect}")
    return sentences


def auto_warmup_steps(total_steps: int) -> int:
    """TinyLlama's share of a run, one step at least; none of a run of one step."""
    return min(max(1, round(_WARMUP_SHARE * total_steps)), total_steps - 1)


def auto_decay_steps(total_steps: int) -> int:
    """A tenth of a run: Hägele et al. 2024 (arXiv 2405.18392) reach a cosine's loss with 10 to 20 %."""
    return total_steps // 10


@dataclass(frozen=True)
class AutoValues:
    """What recipe and machines decide, for the keys that are "auto"."""

    micro_batch: int  # sequences per rank
    batch: int  # global, in sequences
    world_size: int
    total_steps: int
    hidden_size: int
    bf16: bool


def resolve_deepspeed_config(raw: dict, path: Path, values: AutoValues) -> dict:
    """The config with every "auto" filled, as users of Hugging Face's DeepSpeed integration expect.

    Keys that are rejected and off are dropped, and a whole number is an int however it was written. Raises
    `ConfigError` for what DeepSpeed cannot do with these values.
    """
    resolved = _normalize(raw)
    resolved["train_batch_size"] = values.batch
    resolved["gradient_accumulation_steps"] = accumulation_steps(values.batch, values.world_size, values.micro_batch)
    resolved["train_micro_batch_size_per_gpu"] = values.micro_batch
    params = resolved["optimizer"].setdefault("params", {})
    _fill(params, _AUTO_OPTIMIZER)
    _fill(resolved, {"gradient_clipping": 1.0})
    if "bf16" in resolved:
        _fill(resolved["bf16"], {"enabled": values.bf16})
    if "scheduler" in resolved:
        _fill_scheduler(resolved["scheduler"], values.total_steps)
    zero = resolved.setdefault("zero_optimization", {})
    _fill(
        zero,
        {
            "reduce_bucket_size": values.hidden_size**2,
            "stage3_prefetch_bucket_size": int(0.9 * values.hidden_size**2),
            "stage3_param_persistence_threshold": 10 * values.hidden_size,
        },
    )
    raise_problems(path, _problems_of_precision(resolved))
    return resolved


def _normalize(raw: dict) -> dict:
    resolved: dict = {}
    keys = key_tables()
    for full, value in flatten(raw).items():
        if full in keys.accepted or full in keys.sections:
            *sections, key = full.split(".")
            section = resolved
            for name in sections:
                section = section.setdefault(name, {})
            is_whole = full in keys.accepted and keys.accepted[full].is_whole and isinstance(value, float)
            section[key] = int(value) if is_whole else copy.deepcopy(value)
    return resolved


def _problems_of_precision(resolved: dict) -> list[str]:
    """What is wrong only with weights in bf16, or only without."""
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


def _fill_scheduler(scheduler: dict, total_steps: int) -> None:
    warmup, accepted = auto_warmup_steps(total_steps), key_tables().accepted
    autos = {"warmup_num_steps": warmup, "num_warmup_steps": warmup, "num_decay_steps": auto_decay_steps(total_steps)}
    _fill(scheduler["params"], autos)
    for name in ("total_num_steps", "num_training_steps"):
        if scheduler["type"] in accepted[f"scheduler.params.{name}"].schedulers:
            scheduler["params"][name] = total_steps


def _fill(section: dict, values: dict) -> None:
    for key, value in values.items():
        if section.get(key) == "auto":
            section[key] = value


def requested_micro_batch(raw: dict) -> int | None:
    """The micro-batch of the JSON; None where it is "auto" or absent."""
    value = raw.get("train_micro_batch_size_per_gpu", AUTO)
    return None if value == AUTO else int(value)


def computes_in_16_bit(resolved: dict) -> bool:
    """Whether matrix products and attention run in bf16, and not in fp32."""
    return resolved.get("bf16", {}).get("enabled") is True


def weights_dtype(resolved: dict) -> str:
    """PyTorch's name of the dtype in which DeepSpeed keeps the weights that forward and backward use."""
    return "bfloat16" if computes_in_16_bit(resolved) else "float32"


def split_off_our_sections(resolved: dict) -> tuple[dict, dict]:
    """(what DeepSpeed's engine gets, the monitor sections).

    The schedule is applied as a function of tokens by the training loop, and the monitors get the loop's own
    metrics; inside the config, DeepSpeed would step a second schedule and write the next step's learning rate.
    """
    ours = ("scheduler", *_MONITORS)
    engine = {key: value for key, value in resolved.items() if key not in ours}
    return engine, {key: resolved[key] for key in _MONITORS if key in resolved}
