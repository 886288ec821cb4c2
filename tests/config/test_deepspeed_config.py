"""DeepSpeed's JSON: the shipped files, every kind of mistake, and "auto"."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from mutating import mutations, returns_or_refuses

from tinyllama_ds.config.deepspeed import (
    AutoValues,
    load_deepspeed_config,
    requested_micro_batch,
    resolve_deepspeed_config,
    split_off_our_sections,
    warnings_of,
)
from tinyllama_ds.config.recipe import load_recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import make_schedule
from tinyllama_ds.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
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
    return resolve_deepspeed_config(config, path, AutoValues(4, 16, 2, 100, 64, bf16=False))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_resolve_and_pass_deepspeeds_own_parser(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = load_deepspeed_config(path)
    micro_batch = requested_micro_batch(raw) or 4
    resolved = resolve_deepspeed_config(raw, path, AutoValues(micro_batch, 64, 2, 100, 64, bf16=False))
    engine_config, monitors = split_off_our_sections(resolved)
    parsed = DeepSpeedConfig(
        engine_config | {"train_batch_size": 64 // 2, "gradient_accumulation_steps": 32 // micro_batch}
    )
    assert parsed.gradient_clipping == (0.0 if path.stem in ("zero2_muon", "zero3_muon") else 1.0)
    params = resolved["optimizer"]["params"]
    assert (params["betas"], params["weight_decay"]) == ([0.9, 0.95], 0.1)
    schedule = make_schedule(raw, path, RunPlan(load_recipe("tinyllama-v1")))
    assert schedule.min_ratio == {"chat_zero2": 1.0, "demo_wsd": 0.0, "zero3_wsd": 0.0}.get(path.stem, 0.1)
    assert "tensorboard" in monitors


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gradient_cliping": 0.5}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        (
            {"zero_optimization": {"stag": 3}},
            "unknown key 'zero_optimization.stag'; did you mean 'zero_optimization.stage'?",
        ),
        ({"zero_optimization": {"mics_shard_size": 4}}, "mics_shard_size was removed from DeepSpeed 0.19 with MiCS"),
        ({"zero_optimization": 3}, "zero_optimization is 3; expected a section in braces"),
        ({"elasticity": {"enabled": True}}, "elasticity was removed from DeepSpeed 0.19"),
        ({"amp": {}}, "amp was removed from DeepSpeed 0.19 with NVIDIA Apex; use bf16"),
        ({"optimizer": {"params": {}}}, "optimizer.type is missing"),
        (
            {"optimizer": {"type": "AdamW", "params": {"wieght_decay": 0.1}}},
            "unknown key 'optimizer.params.wieght_decay'; did you mean 'optimizer.params.weight_decay'?",
        ),
        ({"bf16": {"enable": True}}, "unknown key 'bf16.enable'; did you mean 'bf16.enabled'?"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported; use bf16"),
        ({"torch_autocast": {"enabled": True, "dtpe": "float16"}}, "torch_autocast is not supported; use bf16"),
        ({"torch_autocast": True}, "torch_autocast is not supported"),
        ({"compile": {"deepcompile": True}}, "compile has no effect without engine.compile(); use pretrain --compile"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not supported; use zero_optimization"),
        ({"comms_logger": {"enabled": True}}, "use tinyllama-ds bench, which measures communication"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint has no effect"),
        ({"data_types": {"keep_in_fp32_modules": ["norm"]}}, "data_types.keep_in_fp32_modules has no effect"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow would change the global batch"),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}, 'sub_group_size is "auto"; expected a whole'),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, 'overlap_comm is "yes"; expected true or false'),
        ({"optimizer": {"type": "SGD"}}, 'optimizer.type is "SGD"; expected AdamW, Adam or Muon'),
        (
            {"optimizer": {"type": "lamb"}},
            'optimizer.type is "lamb", which scales each update by norms of the whole parameter, of which a rank',
        ),
        ({"optimizer": {"type": None}}, "optimizer.type is null; expected AdamW"),
        ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params is null; expected a section in braces"),
        (
            {"optimizer": {"type": "AdamW", "params": {"muon_lr": 1}}},
            "optimizer.params.muon_lr has no effect with AdamW",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "4e-4"}}},
            'optimizer.params.lr is "4e-4"; expected a number',
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": float("nan")}}}, "optimizer.params.lr is NaN; expected a"),
        (
            {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 2}},
            "Muon at stage 2 needs zero_optimization.reduce_scatter: false",
        ),
        ({"optimizer": {"type": "Muon"}}, "Muon at stage 3 needs zero_optimization.reduce_scatter: false"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_optimizer_states differ; expected both"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.nvme_path is missing",
        ),
        ({"gradient_predivide_factor": 2.0}, "makes gradients too small at zero_optimization.stage 3"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1; expected a number of 0 or more"),
        ({"train_batch_size": 16}, 'train_batch_size is 16; expected "auto" or nothing, because the recipe decides'),
        (
            {"zero_optimization.stage": 3},
            """unknown key '"zero_optimization.stage"'""",
        ),
        ({"stage": 3}, "unknown key 'stage'; did you mean 'zero_optimization.stage'?"),
        ({"activation_checkpointing": {}}, "activation_checkpointing would be ignored"),
        ({"scheduler": {"type": "OneCycle"}}, 'scheduler.type is "OneCycle"; expected WarmupCosineLR'),
        ({"scheduler": {"params": {"warmup_num_steps": 3}}}, "scheduler.type is missing; expected WarmupCosineLR, "),
        (
            {"scheduler": {"type": "warmup_stable_decay", "params": {"num_warmup_steps": 3, "cos_min_ratio": 0.1}}},
            "cos_min_ratio has no effect with warmup_stable_decay, only with WarmupCosineLR; remove it",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": COSINE}},
            "cos_min_ratio has no effect with WarmupLR, only with WarmupCosineLR; remove it",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}},
            "scheduler.params.warmup_num_steps is missing; expected a whole number",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"warmup_type": "log"}}},
            'warmup_type is "log"; expected linear',
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"cos_min_ratio": 1.0}}},
            "cos_min_ratio is 1.0; expected a number of 0 or more and less than 1",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"warmup_num_steps": "long"}}},
            'warmup_num_steps is "long"; expected a whole number',
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(tmp_path: Path, change: dict, sentence: str) -> None:
    path = write(tmp_path / "ds.json", BASE | change)
    with pytest.raises(ConfigError) as error:
        load_deepspeed_config(path)
    assert sentence in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"bf16": {}, "bf16": {}}', "the key 'bf16' is given twice"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_broken_files_are_rejected(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_deepspeed_config(path)


def test_auto_is_filled() -> None:
    config = BASE | {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"warmup_num_steps": "auto"}},
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
    assert resolved["scheduler"]["params"]["warmup_num_steps"] == 1
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    wsd = {"num_warmup_steps": "auto", "num_decay_steps": "auto", "num_training_steps": "auto"}
    resolved = resolve(BASE | {"scheduler": {"type": "warmup_stable_decay", "params": wsd}})
    assert resolved["scheduler"]["params"] == {"num_warmup_steps": 1, "num_decay_steps": 10, "num_training_steps": 100}
    assert config["train_batch_size"] == "auto", "the config that was read must not change"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", BASE | {"gradient_cliping": 1, "bf16": {"enabled": "yes"}, "amp": {}})
    with pytest.raises(ConfigError) as error:
        load_deepspeed_config(path)
    first, *problems = re.split(r"; (?=\(\d\))|(?<=: )(?=\(1\))", str(error.value))
    assert first == f"{path}: 3 problems: "
    assert [problem.split()[1] for problem in problems] == ["unknown", "bf16.enabled", "amp"]


def test_a_problem_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BASE | {"zero_optimization": {"stage": 3, "overlap_com": True}}, indent=2))
    line = path.read_text()[: path.read_text().index('"overlap_com"')].count("\n") + 1
    with pytest.raises(ConfigError, match=f"ds.json: line {line}: unknown key 'zero_optimization.overlap_com'; did"):
        load_deepspeed_config(path)


def test_what_is_off_is_dropped(tmp_path: Path) -> None:
    """As files for Hugging Face's Trainer have it."""
    elsewhere = {"fp16": {"enabled": False, "loss_scale": 0}, "wall_clock_breakdown": False, "dump_state": False}
    raw = load_deepspeed_config(write(tmp_path / "ds.json", BASE | elsewhere))
    assert {"fp16", "dump_state"} & resolve(raw).keys() == set()


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 5e8}
    raw = load_deepspeed_config(write(tmp_path / "ds.json", BASE | {"zero_optimization": zero}))
    assert repr(resolve(raw)["zero_optimization"]["reduce_bucket_size"]) == "500000000"


def test_what_may_have_no_effect_is_warned_of() -> None:
    zero = {"stage": 2, "sub_group_size": 10, "zero_quantized_gradients": True, "offload_optimizer": {"ratio": 0.5}}
    found = warnings_of(BASE | {"zero_optimization": zero, "wandb": {"enabled": True}, "comet": {"enabled": False}})
    assert [sentence.split()[0].rstrip(":") for sentence in found] == [
        "zero_optimization.sub_group_size",
        "zero_optimization.zero_quantized_gradients",
        "zero_optimization.offload_optimizer.ratio",
        "wandb.enabled",
    ]
    assert "has no effect at zero_optimization.stage 2, only at 3" in found[0]
    assert warnings_of(BASE) == []


@pytest.mark.parametrize(
    ("stage", "bf16", "offload", "is_clipped"),
    [
        (1, True, False, True),
        (1, False, False, False),
        (1, True, True, False),
        (2, True, False, False),
        (0, False, False, True),
    ],
)
def test_muon_is_clipped_where_deepspeed_sees_gradients(
    stage: int, bf16: bool, offload: bool, is_clipped: bool
) -> None:
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    precise = {"bf16": {"enabled": bf16}, "data_types": {"grad_accum_dtype": "fp32"}}
    config = BASE | precise | {"optimizer": {"type": "Muon"}, "gradient_clipping": 1.0, "zero_optimization": zero}
    assert resolve(config | {"gradient_clipping": 0})
    if is_clipped:
        assert resolve(config)
    else:
        with pytest.raises(ConfigError, match="gradient_clipping would clip what Muon makes of the gradients"):
            resolve(config)


def test_engine_gets_neither_schedule_nor_monitors() -> None:
    resolved = resolve(
        BASE | {"scheduler": {"type": "WarmupCosineLR", "params": COSINE}, "csv_monitor": {"enabled": True}}
    )
    engine_config, monitors = split_off_our_sections(resolved)
    assert "scheduler" not in engine_config
    assert "csv_monitor" not in engine_config
    assert monitors == {"csv_monitor": {"enabled": True}}


def load_and_resolve(path: Path) -> None:
    raw = load_deepspeed_config(path)
    warnings_of(raw)
    resolve_deepspeed_config(raw, path, AutoValues(requested_micro_batch(raw) or 1, 64, 2, 100, 64, bf16=True))


@given(content=mutations(SHIPPED[0].read_bytes()))
def test_a_damaged_config_is_read_or_rejected(content: bytes) -> None:
    returns_or_refuses(load_and_resolve, content, "ds.json")
