"""DeepSpeed's JSON: the shipped files, our tables of keys against the installed DeepSpeed, every kind of mistake."""

import importlib
import json
from pathlib import Path

import pytest

from tinyllama_ds.deepspeed_config import (
    KNOWN_KEYS,
    REMOVED_KEYS,
    load_deepspeed_config,
    read_schedule,
    requested_micro_batch,
    resolve_deepspeed_config,
    split_off_our_sections,
)
from tinyllama_ds.errors import Refusal

SHIPPED = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))
BASE = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3},
}
COSINE = {"warmup_num_steps": 5, "warmup_type": "linear", "cos_min_ratio": 0.1, "total_num_steps": "auto"}


def write(path: Path, config: dict) -> Path:
    path.write_text(json.dumps(config))
    return path


def resolve(config: dict, path: Path = Path("ds.json")) -> dict:
    return resolve_deepspeed_config(
        config, path, micro_batch=4, batch=16, world_size=2, total_steps=100, hidden_size=64, bf16=False
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_resolve_and_pass_deepspeeds_own_parser(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = load_deepspeed_config(path)
    micro_batch = requested_micro_batch(raw, path) or 4
    resolved = resolve_deepspeed_config(
        raw, path, micro_batch=micro_batch, batch=64, world_size=2, total_steps=100, hidden_size=64, bf16=False
    )
    engine_config, monitors = split_off_our_sections(resolved)
    parsed = DeepSpeedConfig(
        engine_config | {"train_batch_size": 64 // 2, "gradient_accumulation_steps": 32 // micro_batch}
    )
    assert parsed.gradient_clipping == 1.0
    params = resolved["optimizer"]["params"]
    assert (params["betas"], params["weight_decay"]) == ([0.9, 0.95], 0.1)
    schedule = read_schedule(raw, path)
    assert schedule is not None
    assert schedule.cos_min_ratio == (1.0 if path.stem == "chat_zero2" else 0.1)
    assert "tensorboard" in monitors


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("zero_optimization", "deepspeed.runtime.zero.config:DeepSpeedZeroConfig"),
        ("zero_optimization.offload_param", "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig"),
        (
            "zero_optimization.offload_optimizer",
            "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
        ),
        ("zero_optimization.leaf_module", "deepspeed.runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig"),
        ("bf16", "deepspeed.runtime.precision_config:DeepSpeedBF16Config"),
        ("fp16", "deepspeed.runtime.precision_config:DeepSpeedFP16Config"),
        ("tensorboard", "deepspeed.monitor.config:TensorBoardConfig"),
        ("csv_monitor", "deepspeed.monitor.config:CSVConfig"),
        ("wandb", "deepspeed.monitor.config:WandbConfig"),
        ("comet", "deepspeed.monitor.config:CometConfig"),
    ],
)
def test_our_tables_are_the_installed_deepspeeds(section: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    module, name = model.split(":")
    fields = {field.alias or key for key, field in getattr(importlib.import_module(module), name).model_fields.items()}
    removed = {key.rsplit(".", 1)[1] for key in REMOVED_KEYS if key.startswith(f"{section}.")}
    assert KNOWN_KEYS[section] == fields - removed


def test_removed_top_level_keys_are_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import config

    assert config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() <= REMOVED_KEYS.keys()
    assert {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS} <= REMOVED_KEYS.keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gradient_cliping": 0.5}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        ({"zero_optimization": {"stag": 3}}, "unknown key 'zero_optimization.stag'; did you mean 'stage'?"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "mics_shard_size was removed from DeepSpeed 0.19 with MiCS"),
        ({"zero_optimization": 3}, "zero_optimization is 3; expected a section in braces"),
        ({"elasticity": {"enabled": False}}, "elasticity was removed from DeepSpeed 0.19"),
        ({"amp": {}}, "amp was removed from DeepSpeed 0.19 with NVIDIA Apex; use bf16"),
        ({"optimizer": {"params": {}}}, "optimizer.type is missing"),
        (
            {"optimizer": {"type": "AdamW", "params": {"wieght_decay": 0.1}}},
            "unknown key 'optimizer.params.wieght_decay'; did you mean 'weight_decay'?",
        ),
        ({"bf16": {"enable": True}}, "unknown key 'bf16.enable'; did you mean 'enabled'?"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported; use bf16"),
        ({"activation_checkpointing": {}}, "activation_checkpointing would be ignored"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type is 'OneCycle'; expected WarmupCosineLR"),
        ({"scheduler": {"type": "WarmupLR", "params": COSINE}}, "belongs to WarmupCosineLR; WarmupLR never falls"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}},
            "scheduler.params.warmup_num_steps is None; expected a number",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"warmup_type": "log"}}},
            "warmup_type must be 'linear'",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"cos_min_ratio": 1.0}}},
            "or WarmupLR for a rate that never falls",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"warmup_num_steps": "auto"}}},
            "warmup_num_steps is 'auto'; expected a number",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(tmp_path: Path, change: dict, sentence: str) -> None:
    path = write(tmp_path / "ds.json", BASE | change)
    with pytest.raises(Refusal) as refusal:
        load_deepspeed_config(path)
    assert sentence in str(refusal.value)
    assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"bf16": {}, "bf16": {}}', "the key 'bf16' is given twice"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(Refusal, match=sentence):
        load_deepspeed_config(path)


def test_auto_is_filled() -> None:
    config = BASE | {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": "WarmupCosineLR", "params": COSINE},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                              "stage3_param_persistence_threshold": "auto"},
    }  # fmt: skip
    resolved = resolve(config)
    assert resolved["train_batch_size"] == 16
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["bf16"] == {"enabled": False}
    assert resolved["optimizer"]["params"] == {"lr": 4e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    assert resolved["scheduler"]["params"]["total_num_steps"] == 100
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert config["train_batch_size"] == "auto", "the config that was read must not change"


@pytest.mark.parametrize(
    ("change", "key", "owner"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16", "the recipe's global_batch_tokens"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2", "the recipe's global_batch_tokens"),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"total_num_steps": 100}}},
            "total_num_steps is 100",
            "the recipe's tokens",
        ),
    ],
)
def test_a_value_given_twice_names_both_places(change: dict, key: str, owner: str) -> None:
    with pytest.raises(Refusal) as refusal:
        resolve(BASE | change)
    assert key in str(refusal.value)
    assert owner in str(refusal.value)


def test_an_auto_that_nobody_fills_is_refused() -> None:
    with pytest.raises(Refusal, match='sub_group_size is "auto", and nothing here knows how to fill it'):
        resolve(BASE | {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})


def test_engine_gets_neither_schedule_nor_monitors() -> None:
    resolved = resolve(
        BASE | {"scheduler": {"type": "WarmupCosineLR", "params": COSINE}, "csv_monitor": {"enabled": True}}
    )
    engine_config, monitors = split_off_our_sections(resolved)
    assert "scheduler" not in engine_config
    assert "csv_monitor" not in engine_config
    assert monitors == {"csv_monitor": {"enabled": True}}
