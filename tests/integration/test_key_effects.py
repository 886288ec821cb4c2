"""Every supported key of the DeepSpeed JSON has its effect: eight steps of two ranks with it, beside a reference.

All curves are made by one pair of ranks, one engine after the other.
"""

import json
from pathlib import Path

import pytest
import torch
from forked import on_ranks
from plain_muon import Muon

from tinyllama_ds.config.deepspeed_keys import key_tables

STEPS, RANKS, MICRO_BATCH, ACCUMULATION, LENGTH = 8, 2, 2, 2, 32
BATCH = MICRO_BATCH * ACCUMULATION * RANKS
ADAM = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
Changes = dict[str, object]


def in_place(full: str, value: object) -> dict:
    """A config with one key, given by its full path."""
    for part in reversed(full.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def merged(*configs: dict) -> dict:
    """Sections put together, the later one's values before the earlier one's."""
    found: dict = {}
    for config in configs:
        for key, value in config.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if both else value
    return found


def at_stage(stage: int, **zero: object) -> dict:
    """Small buckets, so that there are several."""
    return {
        "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": ADAM}, "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 60_000, "allgather_bucket_size": 60_000,
                              "stage3_prefetch_bucket_size": 60_000, "stage3_param_persistence_threshold": 1000} | zero,
    }  # fmt: skip


ZERO = "zero_optimization."
# The same training another way: the stage that it is tried at, and the value.
SAME_CURVE: dict[str, tuple[int, object]] = {
    "prescale_gradients": (2, True),
    "gradient_predivide_factor": (1, 2.0),
    "wall_clock_breakdown": (1, True),
    "bf16.immediate_grad_update": (1, True),
    f"{ZERO}contiguous_gradients": (2, False),
    f"{ZERO}reduce_scatter": (2, False),
    f"{ZERO}reduce_bucket_size": (2, 20_000),
    f"{ZERO}use_multi_rank_bucket_allreduce": (2, False),
    f"{ZERO}allgather_partitions": (2, False),
    f"{ZERO}allgather_bucket_size": (1, 20_000),
    f"{ZERO}overlap_comm": (2, True),
    f"{ZERO}round_robin_gradients": (2, True),
    f"{ZERO}parameter_alignment": (2, True),
    f"{ZERO}sub_group_size": (3, 1000),
    f"{ZERO}stage3_prefetch_bucket_size": (3, 0),
    f"{ZERO}stage3_param_persistence_threshold": (3, 0),
    f"{ZERO}stage3_model_persistence_threshold": (3, 10),
    f"{ZERO}stage3_max_live_parameters": (3, 100),
    f"{ZERO}stage3_max_reuse_distance": (3, 100),
    f"{ZERO}stage3_module_granularity_threshold": (3, 1000),
    f"{ZERO}stage3_use_all_reduce_for_fetch_params": (3, True),
    f"{ZERO}stage3_allgather_sequential": (3, True),
    f"{ZERO}zero_hpz_partition_size": (3, 2),
    f"{ZERO}memory_efficient_linear": (3, False),
    f"{ZERO}enable_sanity_checks": (3, True),
    f"{ZERO}leaf_module.classes": (3, ["tinyllama_ds.model.llama.Block"]),
    f"{ZERO}offload_optimizer.device": (2, "cpu"),
    f"{ZERO}offload_optimizer.pin_memory": (3, False),
    f"{ZERO}offload_param.device": (3, "cpu"),
    f"{ZERO}offload_param.pin_memory": (3, False),
}
_WITH: dict[str, dict] = {  # what a key needs beside it
    "prescale_gradients": {"zero_optimization": {"reduce_scatter": False}},
    "gradient_predivide_factor": {"zero_optimization": {"reduce_scatter": False}},
    f"{ZERO}offload_optimizer.pin_memory": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    f"{ZERO}offload_param.pin_memory": {"zero_optimization": {"offload_param": {"device": "cpu"}}},
}
# Another training, which PyTorch's own optimizer does as well.
LIKE_PYTORCH: dict[str, dict] = {
    "optimizer.params.lr": {"lr": 1e-3},
    "optimizer.params.betas": {"betas": [0.5, 0.6]},
    "optimizer.params.eps": {"eps": 1e-2},
    "optimizer.params.weight_decay": {"weight_decay": 5.0},
    "optimizer.params.amsgrad": {"amsgrad": True, "betas": [0.5, 0.6]},
    "optimizer.params.foreach": {"foreach": True},
    "optimizer.params.fused": {"fused": True},
    "optimizer.params.adam_w_mode": {"adam_w_mode": False},
    "optimizer.params.momentum": {"momentum": 0.5},
    "optimizer.params.muon_lr": {"muon_lr": 0.01},
    "optimizer.params.adam_lr": {"adam_lr": 1e-3},
    "optimizer.params.ns_method": {"ns_method": "standard"},
}
MUON_KEYS = ("momentum", "muon_lr", "adam_lr", "ns_method")
# What has its test elsewhere, as file::function.
ELSEWHERE = {
    "train_batch_size": "config/test_deepspeed_config.py::test_auto_is_filled",
    "train_micro_batch_size_per_gpu": "config/test_plan.py::test_micro_batch",
    "gradient_accumulation_steps": "config/test_deepspeed_config.py::test_auto_is_filled",
    "optimizer.type": "integration/test_key_effects.py::test_optimizer_is_pytorchs",
    "optimizer.param_groups": "integration/test_zero_parity.py::test_parameter_groups_are_plain_pytorchs",
    "scheduler.type": "config/test_schedule.py::test_warmup_lr_stays_at_the_peak",
    "scheduler.params.total_num_steps": "config/test_deepspeed_config.py::test_auto_is_filled",
    "scheduler.params.warmup_num_steps": "config/test_schedule.py::test_equals_published_function",
    "scheduler.params.warmup_min_ratio": "config/test_schedule.py::test_warmup_starts_at_its_ratio",
    "scheduler.params.warmup_type": "config/test_deepspeed_config.py::test_mistakes_are_named",
    "scheduler.params.cos_min_ratio": "config/test_schedule.py::test_equals_published_function",
    "scheduler.params.num_training_steps": "config/test_deepspeed_config.py::test_auto_is_filled",
    "scheduler.params.num_warmup_steps": "config/test_schedule.py::test_wsd_is_that_of_transformers",
    "scheduler.params.num_decay_steps": "config/test_schedule.py::test_wsd_is_that_of_transformers",
    "scheduler.params.decay_type": "config/test_schedule.py::test_wsd_is_that_of_transformers",
    "scheduler.params.min_lr_ratio": "config/test_schedule.py::test_wsd_is_that_of_transformers",
    "scheduler.params.decay_each_stage": "config/test_schedule.py::test_every_stage_may_end_with_a_decay",
    "optimizer.params.torch_adam": "integration/test_key_effects.py::test_adam_that_deepspeed_compiles_is_pytorchs",
    "gradient_clipping": "integration/test_key_effects.py::test_clipping_is_pytorchs",
    "communication_data_type": "integration/test_key_effects.py::test_communication_in_bf16_rounds_gradients",
    "bf16.check_grad_overflow": (
        "integration/test_numerics.py::test_bad_numbers_that_stay_or_get_through_stop_the_run"
    ),
    "bf16.enabled": "integration/test_key_effects.py::test_bf16_is_close_to_fp32",
    "data_types.grad_accum_dtype": "integration/test_key_effects.py::test_bf16_is_close_to_fp32",
    "bf16.bf16_master_weights_and_grads": "integration/test_key_effects.py::test_states_in_bf16_take_6_bytes",
    "bf16.bf16_optimizer_states": "integration/test_key_effects.py::test_states_in_bf16_take_6_bytes",
    f"{ZERO}stage": "integration/test_zero_parity.py::test_curve_equals_plain_pytorch",
    "tensorboard.enabled": "run/test_metrics.py::test_tensorboard_can_be_off",
    "tensorboard.output_path": "run/test_metrics.py::test_tensorboard_writes_to_the_directory_of_the_json",
    "tensorboard.job_name": "run/test_metrics.py::test_tensorboard_writes_to_the_directory_of_the_json",
    "csv_monitor.enabled": "integration/test_key_effects.py::test_csv_files_go_where_the_json_says",
    "csv_monitor.output_path": "integration/test_key_effects.py::test_csv_files_go_where_the_json_says",
    "csv_monitor.job_name": "integration/test_key_effects.py::test_csv_files_go_where_the_json_says",
}


def muon(**params: object) -> dict:
    """Muon without clipping, in fp32, at stage 0: what PyTorch's Muon does, too."""
    chosen = {"type": "Muon", "params": ADAM | {"muon_lr": 0.02, "momentum": 0.95} | params}
    return at_stage(0) | {"optimizer": chosen, "gradient_clipping": 0.0}


def adam(**params: object) -> dict:
    kind = "Adam" if "adam_w_mode" in params else "AdamW"
    return at_stage(1) | {"optimizer": {"type": kind, "params": ADAM | params}}


def variants() -> dict[str, dict]:
    """Every config that is trained, by name."""
    found = {f"stage {stage} in bf16": merged(at_stage(stage), BF16) for stage in (1, 2, 3)}
    for full, (stage, value) in SAME_CURVE.items():
        found[full] = merged(found[f"stage {stage} in bf16"], _WITH.get(full, {}), in_place(full, value))
    for full, params in LIKE_PYTORCH.items():
        found[full] = (muon if full.rpartition(".")[2] in MUON_KEYS else adam)(**params)
    states = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return found | {
        "fp32": at_stage(1),
        "clipped": at_stage(1) | {"gradient_clipping": 0.01},
        "sent in bf16": merged(at_stage(2), {"communication_data_type": "bf16"}),
        "bf16": merged(at_stage(1), {"bf16": {"enabled": True}}),
        **{f"states in bf16, stage {stage}": merged(at_stage(stage), {"bf16": states}) for stage in (2, 3)},
        "muon": muon(),
        "muon 1": merged(muon(), at_stage(1), {"optimizer": muon()["optimizer"]}, BF16),
        "muon 1 unclipped": merged(muon(), BF16, {"zero_optimization": {"stage": 1}}),
        "muon 3 unclipped": merged(muon(), BF16, {"zero_optimization": {"stage": 3, "reduce_scatter": False}}),
    }


def compiled_variants() -> dict[str, dict]:
    """What DeepSpeed compiles, for a minute, on a machine that has not done so yet."""
    part = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    return {
        "fp32": at_stage(1),
        "FusedAdam": adam(torch_adam=False),
        "part offloaded": merged(at_stage(3), part, in_place("optimizer.params.torch_adam", False)),
    }


def train_compiled(output: str) -> None:
    """As `train_all`."""
    found, world = train_each(compiled_variants())
    if world.is_rank0:
        Path(output).write_text(json.dumps(found))


def train_each(configs: dict[str, dict]) -> tuple:
    from deepspeed.accelerator import get_accelerator

    from tinyllama_ds.distributed.world import read_world
    from tinyllama_ds.train.engine import start_process_group

    world = read_world()
    start_process_group(world)
    torch.compiler.set_stance("force_eager")  # DeepSpeed compiles Muon's update for each shape
    # Newton-Schulz in fp32, on CPUs with fp16 too: the last digit of a gradient would be 1e-3 of an update.
    get_accelerator().is_fp16_supported = lambda: False
    found = {}
    for name, config in configs.items():
        losses, norms, engine = _train(config, world)
        found[name] = {"losses": losses, "norms": norms, "bytes": _bytes_of_states(engine)}
    return found, world


def train_all(output: str) -> None:
    """On every rank: each config's losses and norms, and the bytes of its optimizer's tensors, written by rank 0."""
    found, world = train_each(variants())
    if not world.is_rank0:
        return
    found |= {f"PyTorch: {name}": train_plainly(variants()[name]) for name in (*LIKE_PYTORCH, "clipped")}
    Path(output).write_text(json.dumps(found))
    _log_to_csv(Path(output).parent)


def _log_to_csv(folder: Path) -> None:
    from tinyllama_ds.checkpoint.format import Progress
    from tinyllama_ds.run.metrics import MetricsLogger

    section = {"enabled": True, "output_path": str(folder / "logs"), "job_name": "llama"}
    for name, csv in (("run", section), ("other", {"enabled": True}), ("off", {"enabled": False})):
        monitors = {"csv_monitor": csv, "tensorboard": {"enabled": False}}
        metrics = MetricsLogger(folder / name, monitors, Progress(0, 0, 0), "{}")
        metrics.log(1, 10, {"Train/Loss": 1.5})
        metrics.close()


def batches(rank: int) -> list:
    """The micro batches of a rank, the same in every step."""
    from tinyllama_ds.train.batches import Batch

    seeded = torch.Generator().manual_seed(rank)
    return [Batch(torch.randint(512, (MICRO_BATCH, LENGTH + 1), generator=seeded)) for _ in range(ACCUMULATION)]


def _model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from tinyllama_ds.model.config import model_config
    from tinyllama_ds.model.llama import build_model

    return build_model(model_config("test"), "blocked", 1, 0, torch.device("cpu"), dtype)


def _train(config: dict, world: object) -> tuple:
    """On one rank too, which has the batches of both then."""
    from tinyllama_ds.config.deepspeed import weights_dtype
    from tinyllama_ds.config.run_plan import Step
    from tinyllama_ds.distributed.collectives import sum_over_ranks
    from tinyllama_ds.train.engine import wrap
    from tinyllama_ds.train.phase_clock import PhaseClock
    from tinyllama_ds.train.step import train_step

    mine = [batch for rank in range(world.rank, RANKS, world.size) for batch in batches(rank)]
    config = config | {"gradient_accumulation_steps": len(mine)}
    engine = wrap(_model(getattr(torch, weights_dtype(config))), config, 1.0)
    clock, losses, norms = PhaseClock(world.device), [], []
    for number in range(STEPS):
        step = Step(number, "only", 0, BATCH, 0, BATCH * LENGTH)
        loss, norm = train_step(engine, step, iter(mine), MICRO_BATCH, world, clock)
        losses.append(float(sum_over_ranks(loss)) / world.size)
        norms.append(float(norm))
    return losses, norms, engine


def _bytes_of_states(engine: object) -> int:
    """Bytes of master weights and moments on this rank."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    at_stage_3 = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    groups = at_stage_3 or [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*groups, *moments) if tensor.dim())


def train_plainly(config: dict) -> dict:
    """The same without DeepSpeed, in fp32, on one rank that has all batches."""
    model, losses, norms = _model(), [], []
    optimizers = _optimizers(model, config["optimizer"])
    everything = [batch for rank in range(RANKS) for batch in batches(rank)]
    for _ in range(STEPS):
        loss = sum(model(*batch.model_inputs(torch.device("cpu"))) for batch in everything) / len(everything)
        loss.backward()
        limit = config["gradient_clipping"] or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms}


def _optimizers(model: torch.nn.Module, chosen: dict) -> list[torch.optim.Optimizer]:
    params = dict(chosen["params"])
    kinds = {key: params.pop(key, None) for key in ("torch_adam", "adam_w_mode", "ns_method", "fused", "foreach")}
    muon = {"lr": params.pop("muon_lr", 0.02), "momentum": params.pop("momentum", 0.95)}
    muon["dtype"] = torch.bfloat16 if kinds["ns_method"] == "standard" else torch.float32
    params["lr"] = params.pop("adam_lr", params["lr"])
    if chosen["type"] != "Muon":
        kind = torch.optim.Adam if kinds["adam_w_mode"] is False else torch.optim.AdamW
        return [kind(model.parameters(), **params)]
    named = list(model.named_parameters())
    is_matrix = {name: p.dim() == 2 and "embed" not in name and "lm_head" not in name for name, p in named}
    matrices = [p for name, p in named if is_matrix[name]]
    others = [p for name, p in named if not is_matrix[name]]
    return [
        Muon(matrices, weight_decay=params["weight_decay"], **muon),
        torch.optim.AdamW(others, **params),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    output = tmp_path_factory.mktemp("keys") / "curves.json"
    finished = on_ranks(train_all, str(output), ranks=RANKS)
    assert finished.returncode == 0, finished.stderr
    return {"console": finished.stdout, "folder": output.parent} | json.loads(output.read_text())


def test_every_supported_key_is_tried() -> None:
    tried = {*SAME_CURVE, *LIKE_PYTORCH, *ELSEWHERE}
    assert tried == key_tables().supported.keys()
    tests = Path(__file__).parents[1]
    for place in ELSEWHERE.values():
        file, _, function = place.partition("::")
        assert f"def {function}" in (tests / file).read_text(), place


@pytest.mark.parametrize("full", SAME_CURVE)
def test_the_curve_is_that_without_the_key(full: str, trained: dict) -> None:
    stage, _ = SAME_CURVE[full]
    reference = trained[f"stage {stage} in bf16"]
    assert trained[full]["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert trained[full]["norms"] == pytest.approx(reference["norms"], rel=1e-3)


@pytest.mark.parametrize("full", LIKE_PYTORCH)
def test_optimizer_is_pytorchs(full: str, trained: dict) -> None:
    reference, name = trained[f"PyTorch: {full}"], full.rpartition(".")[2]
    tolerance = 1e-3 if name == "ns_method" else 1e-5  # in bf16
    assert trained[full]["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    is_another = name not in ("foreach", "fused", "ns_method")
    base = trained["muon" if name in MUON_KEYS else "fp32"]["losses"]
    assert (trained[full]["losses"] != pytest.approx(base, rel=1e-3)) == is_another


def test_clipping_is_pytorchs(trained: dict) -> None:
    assert trained["clipped"]["losses"] == pytest.approx(trained["PyTorch: clipped"]["losses"], rel=1e-5)
    assert trained["clipped"]["norms"] == pytest.approx(trained["PyTorch: clipped"]["norms"], rel=1e-4)


def test_bf16_is_close_to_fp32(trained: dict) -> None:
    for name in ("bf16", "stage 1 in bf16", "stage 2 in bf16", "stage 3 in bf16"):
        assert trained[name]["losses"] == pytest.approx(trained["fp32"]["losses"], rel=1e-2)
        assert trained[name]["losses"] != trained["fp32"]["losses"]
    assert trained["bf16"]["losses"] != trained["stage 1 in bf16"]["losses"]


def test_communication_in_bf16_rounds_gradients(trained: dict) -> None:
    assert trained["sent in bf16"]["losses"] == pytest.approx(trained["fp32"]["losses"], rel=1e-3)
    assert trained["sent in bf16"]["norms"] != trained["fp32"]["norms"]


@pytest.mark.parametrize("stage", [2, 3])
def test_states_in_bf16_take_6_bytes(stage: int, trained: dict) -> None:
    """Instead of 12 per parameter, and the loss stays within 1 % of that with fp32 states."""
    states, reference = trained[f"states in bf16, stage {stage}"], trained[f"stage {stage} in bf16"]
    assert states["losses"] == pytest.approx(reference["losses"], rel=1e-2)
    assert reference["bytes"] == pytest.approx(12 * 158_016 / RANKS, rel=0.02)
    assert states["bytes"] == pytest.approx(reference["bytes"] / 2, rel=0.01)


def test_muon_is_clipped_as_gradients_at_stage_1_only(trained: dict) -> None:
    """Elsewhere DeepSpeed's norm is that of orthogonalized updates, so that a clipping must be refused."""
    plain = trained["PyTorch: optimizer.params.ns_method"]
    for name in ("muon 1 unclipped", "muon 3 unclipped"):
        assert trained[name]["losses"] == pytest.approx(plain["losses"], rel=1e-2)
    assert trained["muon 1"]["norms"][0] == pytest.approx(plain["norms"][0], rel=1e-2)
    assert trained["muon 3 unclipped"]["norms"][0] > 10 * plain["norms"][0]


def test_wall_clock_breakdown_is_printed(trained: dict) -> None:
    assert "fwd_microstep" in trained["console"]


def test_csv_files_go_where_the_json_says(trained: dict) -> None:
    folder = trained["folder"]
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.csv"))
    assert written == ["logs/llama/Train_Loss.csv", "other/csv/Train_Loss.csv"]
    assert (folder / "logs/llama/Train_Loss.csv").read_text().split() == ["step,Loss", "1,1.5"]


@pytest.mark.real
def test_adam_that_deepspeed_compiles_is_pytorchs(tmp_path: Path) -> None:
    finished = on_ranks(train_compiled, str(tmp_path / "curves.json"), ranks=RANKS)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "curves.json").read_text())
    for name in ("FusedAdam", "part offloaded"):
        assert found[name]["losses"] == pytest.approx(found["fp32"]["losses"], rel=1e-4), name
