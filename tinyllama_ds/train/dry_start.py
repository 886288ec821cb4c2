"""The engine's dry start: DeepSpeed with the run's config and a small model of two layers, before a launch.

What DeepSpeed does not accept, or cannot do on this machine, ends here in one sentence, instead of in a traceback on
every rank at each of the supervisor's starts.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tinyllama_ds.config.param_groups import without_param_groups
from tinyllama_ds.errors import ConfigError

_SECONDS = 900.0  # DeepSpeed may have to compile a kernel
_LONGEST = 400  # characters of DeepSpeed's reason


def check_engine_start(engine_config: dict, path: Path, device_type: str) -> None:
    """Start the engine in a process of its own, on one device of this machine.

    Raises `ConfigError` with DeepSpeed's reason. A device without enough free memory is not an error.
    """
    # A process that has used CUDA cannot be forked; without it, a fork has all imports already.
    context: Any = multiprocessing.get_context("spawn" if device_type == "cuda" else "fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (_on_one_rank(engine_config), device_type, sender)
    process = context.Process(target=_start, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        reason = receiver.recv() if receiver.poll(_SECONDS) else f"it has not started in {_SECONDS:.0f} s"
    except EOFError:
        process.join()
        reason = _end_of(process.exitcode)
    finally:
        process.kill()
        process.join()
    if reason:
        raise ConfigError(f"{path}: DeepSpeed cannot start with this config: {reason}")


def _on_one_rank(config: dict) -> dict:
    """The same config for a single rank, without groups of the real model's parameters."""
    micro_batch, zero = config["train_micro_batch_size_per_gpu"], dict(config["zero_optimization"])
    zero.pop("zero_hpz_partition_size", None)
    alone = {"train_batch_size": micro_batch, "gradient_accumulation_steps": 1, "zero_optimization": zero}
    return without_param_groups(config) | alone


def _start(config: dict, device_type: str, sender: Connection) -> None:
    """In the new process: send an empty text, or why the engine does not start."""
    from tinyllama_ds.config.deepspeed import weights_dtype
    from tinyllama_ds.distributed.world import DistributedInfo
    from tinyllama_ds.model.config import model_config
    from tinyllama_ds.model.llama import build_model
    from tinyllama_ds.train.engine import start_process_group, wrap

    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(silence, descriptor)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    world = DistributedInfo(0, 0, 1, torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu"), 1)
    try:
        start_process_group(world)
        dtype = getattr(torch, weights_dtype(config))
        model = build_model(model_config("test"), "sdpa", 1, 0, world.device, dtype)
        wrap(model, config, 1.0)
        reason = _without_leaves(model, config)
    except torch.OutOfMemoryError:
        reason = ""
    except Exception as error:  # whatever DeepSpeed raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
    sender.send(reason)
    os._exit(0)


def _without_leaves(model: torch.nn.Module, config: dict) -> str:
    """DeepSpeed ignores a class of leaf modules that the model does not have."""
    from deepspeed.utils.z3_leaf_module import z3_leaf_module

    zero = config["zero_optimization"]
    if zero.get("stage") != 3 or "leaf_module" not in zero or any(map(z3_leaf_module, model.modules())):
        return ""
    return "zero_optimization.leaf_module.classes names no module of the model, as tinyllama_ds.model.llama.Block is"


def _end_of(code: int | None) -> str:
    return f"its process was ended by {signal.Signals(-code).name}" if code and code < 0 else f"it ended with {code}"
