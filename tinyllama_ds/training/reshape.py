"""Elastic resume: a checkpoint in whole tensors, loaded into any number of ranks and any ZeRO stage.

DeepSpeed's universal checkpoints change the number of ranks within a family of stages only: what its converter writes
for stage 3 its loader for stage 1 cannot read, and the other way round. The folder written here satisfies both loaders,
and stage 0, for which DeepSpeed has neither:

    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt   {"param": the whole tensor, in its shape}
    zero/<parameter>/step.pt                        where the loader of stages 1 and 2 looks for the step
    zero/optimizer_state.pt                         and where that of stage 3 does
"""

import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinyllama_ds.errors import Refusal

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Shapes = dict[str, torch.Size]
_STATES = ("fp32", "exp_avg", "exp_avg_sq")


def parameter_shapes(engine: "DeepSpeedEngine") -> Shapes:
    """The whole shape of every parameter, whether it is partitioned or not, in the order of the model."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}


def write_whole_tensors(checkpoint: Path, zero_stage: int, shapes: Shapes, output: Path) -> None:
    """Convert a verified checkpoint of any layout to a folder for `load_whole_tensors`. Called by one rank."""
    shutil.rmtree(output, ignore_errors=True)
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
    torch.save(state | {"optimizer_state_dict": nested}, output / "zero" / "optimizer_state.pt")


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
    import deepspeed

    saved = _load(checkpoint / "mp_rank_00_model_states.pt")
    optimizer = saved["optimizer"]
    if "state" not in optimizer:
        raise Refusal(f"{checkpoint}: stage 0 in bf16 can only be continued on the layout that it was saved with")
    for number, name in enumerate(shapes):  # one group: the optimizer numbers the parameters in the model's order
        folder = output / "zero" / name
        folder.mkdir(parents=True)
        moments = optimizer["state"][number]
        for key, tensor in (("fp32", saved["module"][name]), *((key, moments[key]) for key in _STATES[1:])):
            torch.save({"param": tensor}, folder / f"{key}.pt")
        torch.save(moments["step"], folder / "step.pt")
    return {"ds_version": deepspeed.__version__, "param_groups": optimizer["param_groups"]}


def _load_stage_0(engine: "DeepSpeedEngine", folder: Path) -> None:
    if engine.bfloat16_enabled():
        raise Refusal("DeepSpeed's stage 0 in bf16 cannot continue a checkpoint of another layout; use stage 1, 2 or 3")
    for name, parameter in engine.module.named_parameters():
        place = folder / "zero" / name
        whole = {key: _load(place / f"{key}.pt")["param"].to(parameter.device) for key in _STATES}
        parameter.data.copy_(whole.pop("fp32"))
        step = torch.as_tensor(_load(place / "step.pt"), dtype=torch.float32).clone()
        engine.optimizer.state[parameter] = whole | {"step": step}


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
