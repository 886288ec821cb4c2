"""What every rank does: TRL's DPOTrainer on a Hugging Face folder, with the engine of a DeepSpeed JSON."""

import logging
import os
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from tinyllama_ds.bars import progress
from tinyllama_ds.config.deepspeed import (
    AutoValues,
    load_deepspeed_config,
    resolve_deepspeed_config,
    split_off_our_sections,
)
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import write_object
from tinyllama_ds.hf.convert import load_hf_folder
from tinyllama_ds.preference.pairs import read_pairs
from tinyllama_ds.preference.report import LOSS, MARGIN
from tinyllama_ds.train.engine import start_process_group, supports_fast_bf16

HISTORY_FILE = "history.json"
TUNED = "tuned"  # what TRL saves
_LOGS_VARIABLE = "TENSORBOARD_LOGGING_DIR"  # of transformers
_GATHER = "stage3_gather_16bit_weights_on_model_save"


@dataclass(frozen=True)
class Tuning:
    """One call of `prefer`."""

    folder: Path  # of Hugging Face, with a chat template
    work: Path  # where the ranks write
    preferences: Path
    validation: Path | None
    deepspeed_config: Path
    batch_size: int  # preferences per step
    epochs: float
    learning_rate: float
    beta: float
    max_tokens: int
    seed: int


def require_trl() -> None:
    """Raises `ConfigError` where the package is missing."""
    if find_spec("trl") is None:
        raise ConfigError("prefer needs TRL, which is not installed; pip install 'tinyllama_ds[prefer]'")


def tune(tuning: Tuning, world: DistributedInfo) -> None:
    """Train, and on rank 0 write the tuned model and the history of its logs. Collective."""
    engine = engine_config(tuning, world.size, supports_fast_bf16(world.device))
    start_process_group(world)
    os.environ[_LOGS_VARIABLE] = str(tuning.work / "tensorboard")
    import datasets
    import trl

    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of the JSON's gradient accumulation
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that TRL gives it
    pairs = datasets.Dataset.from_list(list(read_pairs(tuning.preferences)))
    held_out = datasets.Dataset.from_list(list(read_pairs(tuning.validation))) if tuning.validation else None
    dtype = torch.bfloat16 if engine.get("bf16", {}).get("enabled") else torch.float32
    model, tokenizer = load_hf_folder(tuning.folder, dtype)
    reference, _ = load_hf_folder(tuning.folder, dtype)
    with redirect_stdout(StringIO()):  # DeepSpeed print()s its memory
        trainer = trl.DPOTrainer(
            model,
            reference,
            _trl_config(tuning, engine, world, has_validation=held_out is not None),
            train_dataset=pairs,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        _show_progress(trainer, world)
        trainer.train()
    trainer.save_model(str(tuning.work / TUNED))
    if world.is_rank0:
        write_object(tuning.work / HISTORY_FILE, {"history": trainer.state.log_history})


def _show_progress(trainer: Any, world: DistributedInfo) -> None:
    """A bar on rank 0 in place of transformers' own, which prints a line for every step."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.bar = progress(total=state.max_steps, desc="prefer", unit="step", disable=not world.is_rank0)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if MARGIN in (logs or {}):  # every step has a log
                self.bar.set_postfix_str(f"loss {logs[LOSS]:.4f}, margin {logs[MARGIN]:.3f}", refresh=False)
                self.bar.update()

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.bar.close()

    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(Bar)


def engine_config(tuning: Tuning, world_size: int, bf16: bool) -> dict:
    """What DeepSpeed's engine gets: the JSON without its schedule and monitors, which are TRL's here.

    Raises `ConfigError` where the batch cannot be divided among the ranks.
    """
    raw = load_deepspeed_config(tuning.deepspeed_config)
    if "param_groups" in raw["optimizer"]:
        raise ConfigError(f"{tuning.deepspeed_config}: optimizer.param_groups has no effect with prefer; remove it")
    if tuning.batch_size % world_size:
        raise ConfigError(f"--batch-size {tuning.batch_size}: expected a multiple of the {world_size} ranks")
    per_rank = tuning.batch_size // world_size
    requested = raw.get("train_micro_batch_size_per_gpu", "auto")
    micro_batch = per_rank if requested == "auto" else min(requested, per_rank)
    while per_rank % micro_batch:
        micro_batch -= 1
    values = AutoValues(micro_batch, tuning.batch_size, world_size, total_steps=1, hidden_size=1, bf16=bf16)
    engine, _ = split_off_our_sections(resolve_deepspeed_config(raw, tuning.deepspeed_config, values))
    engine["optimizer"]["params"]["lr"] = tuning.learning_rate
    if engine.get("zero_optimization", {}).get("stage") == 3:
        engine["zero_optimization"][_GATHER] = True
    return engine


def _trl_config(tuning: Tuning, engine: dict, world: DistributedInfo, has_validation: bool) -> Any:
    import trl

    return trl.DPOConfig(
        output_dir=str(tuning.work / "trl"),
        deepspeed=engine,
        beta=tuning.beta,
        learning_rate=tuning.learning_rate,
        max_length=tuning.max_tokens,
        num_train_epochs=tuning.epochs,
        per_device_train_batch_size=engine["train_micro_batch_size_per_gpu"],
        per_device_eval_batch_size=engine["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=engine["gradient_accumulation_steps"],
        max_grad_norm=engine["gradient_clipping"],
        weight_decay=engine["optimizer"]["params"].get("weight_decay", 0.0),
        adam_beta1=engine["optimizer"]["params"]["betas"][0],
        adam_beta2=engine["optimizer"]["params"]["betas"][1],
        adam_epsilon=engine["optimizer"]["params"]["eps"],
        bf16=engine.get("bf16", {}).get("enabled", False),
        gradient_checkpointing=world.device.type != "cpu",
        warmup_steps=0.1,  # of all steps
        lr_scheduler_type="linear",
        logging_steps=1,
        report_to=["tensorboard"],
        save_strategy="no",
        eval_strategy="epoch" if has_validation else "no",
        seed=tuning.seed,
        use_cpu=world.device.type == "cpu",
    )
