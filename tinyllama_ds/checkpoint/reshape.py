"""Elastic resume: a checkpoint in whole tensors, loaded into any number of ranks and any ZeRO stage.

DeepSpeed's universal checkpoints change the number of ranks within a family of stages only: what its converter writes
for stage 3 its loader for stage 1 cannot read, and the other way round. The folder written here satisfies both loaders,
and stage 0, for which DeepSpeed has neither:

    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt   {"param": the whole tensor, in its shape}
    zero/<parameter>/step.pt                        where the loader of stages 1 and 2 looks for the step
    zero/optimizer_state.pt                         and where that of stage 3 does
"""

from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinyllama_ds.files import remove

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Shapes = dict[str, torch.Size]
_STATES = ("fp32", "exp_avg", "exp_avg_sq")


def parameter_shapes(engine: "DeepSpeedEngine") -> Shapes:
    """The whole shape of every parameter, whether it is partitioned or not, in the order of the model."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}


def write_whole_tensors(checkpoint: Path, zero_stage: int, shapes: Shapes, output: Path) -> None:
    """Convert a verified checkpoint of any layout to a folder for `load_whole_tensors`. Called by one rank."""
    import deepspeed

    remove(output)
    if zero_stage == 0:
        state = _write_stage_0(checkpoint, shapes, output)
    else:
        state = _convert_with_deepspeed(checkpoint, output)
    step = _step_of(state, output / "zero" / next(iter(shapes)) / "step.pt")
    for name, shape in shapes.items():
        folder = output / "zero" / name
        for key in _STATES:
            loaded = _load(folder / f"{key}.pt")
            whole = loaded["param"] if isinstance(loaded, dict) else loaded
            torch.save({"param": whole.reshape(shape)}, folder / f"{key}.pt")
        torch.save(step, folder / "step.pt")
    groups = state["param_groups"]
    nested = {"state": {0: {"step": step}}, "param_groups": groups}
    version = {"ds_version": deepspeed.__version__}  # asked for by stages 1 and 2, not among the state of stage 3
    torch.save(state | version | {"optimizer_state_dict": nested}, output / "zero" / "optimizer_state.pt")


def load_whole_tensors(engine: "DeepSpeedEngine", folder: Path) -> None:
    """Collective. Fill weights, moments and step of an engine of any stage from what `write_whole_tensors` wrote."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        _load_stage_0(engine, folder)
        return
    engine.optimizer._load_universal_checkpoint(str(folder), True, False)
    if stage < 3:
        engine.optimizer.update_lp_params()
        return
    for state in engine.optimizer.optimizer.state.values():  # DeepSpeed gives all groups one tensor, stepped by each
        state["step"] = state["step"].clone() if torch.is_tensor(state["step"]) else state["step"]


def _convert_with_deepspeed(checkpoint: Path, output: Path) -> dict[str, Any]:
    """The optimizer state that holds for all parameters; DeepSpeed's converter writes the rest."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(output),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        ds_to_universal.main(arguments)
    (output.parent / "latest_universal").unlink()
    return _load(output / "zero" / "optimizer_state.pt")


def _step_of(state: dict[str, Any], step_file: Path) -> Any:
    if step_file.is_file():
        return _load(step_file)
    return state["optimizer_state_dict"]["state"][0]["step"]


def _write_stage_0(checkpoint: Path, shapes: Shapes, output: Path) -> dict[str, Any]:
    """One group in the order of the model: under bf16 as one flat master or one of each parameter, else the weights."""
    saved = _load(checkpoint / "mp_rank_00_model_states.pt")
    optimizer = saved["optimizer"].get("optimizer_state_dict", saved["optimizer"])
    masters: list = saved["optimizer"].get("fp32_groups_flat") or sum(saved["optimizer"].get("fp32_groups", []), [])
    moments = [optimizer["state"][number] for number in sorted(optimizer["state"])]
    parts = {"fp32": masters or [saved["module"][name] for name in shapes]}
    parts |= {key: [moment[key] for moment in moments] for key in _STATES[1:]}
    sizes = [shape.numel() for shape in shapes.values()]
    whole = {
        key: torch.cat([part.detach().flatten() for part in tensors]).split(sizes) for key, tensors in parts.items()
    }
    for number, name in enumerate(shapes):
        folder = output / "zero" / name
        folder.mkdir(parents=True)
        for key in _STATES:
            torch.save({"param": whole[key][number].clone()}, folder / f"{key}.pt")
        torch.save(moments[0]["step"], folder / "step.pt")
    return {"param_groups": optimizer["param_groups"]}


def stage_0_masters(engine: "DeepSpeedEngine") -> list[torch.Tensor]:
    """The fp32 masters of an engine of stage 0 in the order of the model: one of each parameter, or one flat one."""
    if not engine.bfloat16_enabled():
        return list(engine.module.parameters())
    wrapper = engine.optimizer
    return wrapper.fp32_groups_flat if hasattr(wrapper, "fp32_groups_flat") else sum(wrapper.fp32_groups, [])


def _load_stage_0(engine: "DeepSpeedEngine", folder: Path) -> None:
    masters, optimizer = stage_0_masters(engine), engine.optimizer
    if engine.bfloat16_enabled():
        optimizer = optimizer.optimizer
    places = {name: folder / "zero" / name for name, _ in engine.module.named_parameters()}
    sizes = [master.numel() for master in masters]
    flat = {
        key: torch.cat([_load(place / f"{key}.pt")["param"].flatten() for place in places.values()]).split(sizes)
        for key in _STATES
    }
    step = torch.as_tensor(_load(next(iter(places.values())) / "step.pt"), dtype=torch.float32)
    for number, master in enumerate(masters):
        weight, *moments = (flat[key][number].reshape(master.shape).to(master, copy=True) for key in _STATES)
        master.data.copy_(weight)
        optimizer.state[master] = dict(zip(_STATES[1:], moments, strict=True)) | {"step": step.clone()}
    for name, parameter in engine.module.named_parameters():
        parameter.data.copy_(_load(places[name] / "fp32.pt")["param"])


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
