"""The command `plan`: what a run needs, costs and does, before it starts."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.benchmark import grid as bench
from tinyllama_ds.commands.arguments import (
    MEMORY_SIZE,
    SHARE,
    Number,
    add_shared,
    as_dataclass,
    output_file,
    output_picture,
)
from tinyllama_ds.commands.placement import local_placement
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.errors import ConfigError, all_of
from tinyllama_ds.launch.hostfile import read_hostfile
from tinyllama_ds.launch.launcher import MEASURE, launcher_command, launcher_environment
from tinyllama_ds.outputs import write_figure, write_file

if TYPE_CHECKING:
    from tinyllama_ds.ladder.run_prediction import Predicted
    from tinyllama_ds.planning.communication import Hosts, Traffic
    from tinyllama_ds.planning.plan import Inputs, Plan
    from tinyllama_ds.planning.search import Ranking
    from tinyllama_ds.planning.timing import Machines


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "--recipe", "--deepspeed-config")
    _add_machines(parser.add_argument_group("machines"))
    add = parser.add_argument_group("speed").add_argument
    share = "share of the peak while a GPU computes (default: TinyLlama's %(default)s)"
    add("--efficiency", type=SHARE, default=0.56, help=share)
    add("--tokens-per-second", type=Number(most=1e12), metavar="X", help="measured rate of one GPU, all included")
    add("--measure", action="store_true", help="measure the step here with bench, instead of --efficiency")
    training = parser.add_argument_group("training")
    add_shared(training, "--attention", "--activation-checkpointing", "--sequence-parallel", help="as in pretrain")
    add_shared(training, "--compile", help="as in pretrain; auto (the default) is on")
    add = training.add_argument
    add("--search", action="store_true", help="try every layout, micro-batch and checkpointing; rank them")
    add("--write-config", type=output_file, metavar="JSON", help="with --search: the winner's DeepSpeed config")
    add_shared(parser, "--data", required=False, help="prepared data, for the sizes of the sources")
    add = parser.add_argument
    add("--price-per-hour", type=Number(least=0, most=1e6), metavar="USD", help="of one GPU")
    add("--ladder", type=Path, metavar="DIR", help="finished ladder that predicts the losses of this recipe")
    add("--save-seconds", type=Number(most=1e6), default=15, metavar="S", help="stall of a save")
    add("--picture", type=output_picture, metavar="PNG", help="learning rate, batch and mixture over tokens")
    add("--html", type=output_file, metavar="FILE", help="the whole plan as one self-contained page")
    add_shared(parser, "--json")


def _add_machines(group: "argparse._ArgumentGroup") -> None:
    hosts = group.add_mutually_exclusive_group()
    add_shared(hosts, "--hostfile")
    add_shared(hosts, "--num-gpus", default=8, help="of one host, without a hostfile")
    add = group.add_argument
    add("--gpu", default="a100-40g", help="by name: a100-40g, h100, rtx-4090 ...")
    add("--gpu-memory", type=MEMORY_SIZE, metavar="SIZE", help="of any other GPU, such as 40GiB")
    add("--peak-tflops", type=Number(most=1e6), metavar="X", help="dense bf16 rate of any other GPU")
    add("--network", type=Number(most=1e6), default=100, metavar="GBIT", help="out of each host, Gbit/s")


def _plan(options: argparse.Namespace) -> int:
    """Show what a run needs, costs and does, before it starts."""
    from tinyllama_ds.planning.page import plan_text, ranking_table, tables_of
    from tinyllama_ds.planning.plan import PlanRequest, make_plan, read_inputs, reject_too_large
    from tinyllama_ds.planning.search import reason, search

    _check_arguments(options)
    inputs, hosts = all_of(lambda: read_inputs(options.recipe, options.deepspeed_config), lambda: _hosts(options))
    predicted = _predicted(options.ladder, inputs) if options.ladder else None
    options.machines, options.is_compiled = _machines(options, inputs, hosts), options.compile != "off"
    request = as_dataclass(PlanRequest, options)
    sizes = _source_sizes(options.data, inputs)
    ranking = search(request, inputs, sizes) if options.search else None
    plan = ranking.candidates[0] if ranking else make_plan(request, inputs, sizes)
    if options.write_config:
        write_file(options.write_config, json.dumps(plan.inputs.raw, indent=2) + "\n")
    if not plan.fits:
        reject_too_large(plan, [reason(best) for best in search(request, inputs, sizes).candidates[:3]])
    tables = [*([ranking_table(ranking)] if ranking else []), *tables_of(plan)]
    if predicted:
        tables.insert(1, predicted.table())
    text = plan_text(plan, tables) + (_how_to_start(options, plan) if ranking else "")
    found = {"predicted_losses": predicted.as_dict()} if predicted else {}
    code = print_result(options, _result(plan, ranking) | found, text)
    _write_files(options, plan, tables, predicted.charts() if predicted else [])
    return code


def _predicted(ladder: Path, inputs: "Inputs") -> "Predicted":
    from tinyllama_ds.ladder.run_prediction import predict

    return predict(ladder, inputs.recipe)


def _check_arguments(options: argparse.Namespace) -> None:
    if options.write_config and not options.search:
        raise ConfigError("--write-config writes the result of --search; give --search as well")
    if options.measure and options.sequence_parallel > 1:
        raise ConfigError("--measure measures a step without sequence parallelism; give --efficiency instead")
    if (options.gpu_memory is None) != (options.peak_tflops is None):
        raise ConfigError("--gpu-memory and --peak-tflops describe one GPU; give both, or --gpu alone")


def _machines(options: argparse.Namespace, inputs: "Inputs", hosts: "Hosts") -> "Machines":
    from tinyllama_ds.hardware.gpus import custom_gpu, gpu_named, network_of
    from tinyllama_ds.planning.timing import Machines

    gpu = gpu_named(options.gpu)
    if options.gpu_memory is not None:
        gpu = custom_gpu(options.gpu_memory, options.peak_tflops, gpu)
    compute = options.efficiency * gpu.peak_flops
    source = f"{options.efficiency:.0%} of the spec sheet's {gpu.peak_flops / 1e12:,.0f} TFLOP/s while a GPU computes"
    if options.measure:
        compute, source = _measured(options, inputs)
    return Machines(hosts, gpu, network_of(gpu, options.network), compute, source)


def _hosts(options: argparse.Namespace) -> "Hosts":
    from tinyllama_ds.planning.communication import Hosts

    if options.hostfile is None:
        return Hosts(1, options.num_gpus)
    hosts = read_hostfile(options.hostfile)
    slots = {host.slots for host in hosts}
    if len(slots) > 1:
        raise ConfigError(f"{options.hostfile}: hosts of {sorted(slots)} slots; expected the same number on every host")
    return Hosts(len(hosts), slots.pop())


def _measured(options: argparse.Namespace, inputs: "Inputs") -> tuple[float, str]:
    """FLOP/s of one rank in the real step on this machine, and how that was measured."""
    from tinyllama_ds.config.deepspeed import requested_micro_batch

    here = local_placement(None)
    placement = replace(here, num_local=1) if here.on_cpu else here
    is_compiled = options.compile == "on" or (options.compile == "auto" and not here.on_cpu)
    micro_batch = requested_micro_batch(inputs.raw) or 1
    settings = bench.grid([options.deepspeed_config], [micro_batch], [options.attention], [is_compiled])
    shared = {
        "model": inputs.recipe.model_name,
        "sequence_length": inputs.recipe.sequence_length,
        "activation_checkpointing": options.activation_checkpointing,
        "accumulation": 4,
        "steps": 3,
    }
    (row,) = bench.measure_all(
        [setting | shared for setting in settings],
        lambda arguments: launcher_command(placement, arguments, MEASURE),
        launcher_environment(placement),
    )
    if "error" in row:
        raise ConfigError(f"--measure: the step did not run here: {row['error']}")
    rate = row["tokens_per_second"] / row["ranks"]
    flops = rate * inputs.model.flops_per_token(inputs.recipe.sequence_length)
    return flops, f"measured here: {rate:,.0f} tokens/s per rank on {row['ranks']} ranks, {flops / 1e12:.2f} TFLOP/s"


def _source_sizes(data: Path | None, inputs: "Inputs") -> dict[str, int]:
    """Tokens of each source, padding of packs included: of the prepared data, or as published."""
    from tinyllama_ds.planning.timeline import PUBLISHED_TOKENS

    if data is None:
        return {name: PUBLISHED_TOKENS[name] for name in inputs.recipe.sources if name in PUBLISHED_TOKENS}
    from tinyllama_ds.data.loader import open_streams

    if not data.is_dir():
        raise ConfigError(f"{data}: the data directory is missing")
    recipe = inputs.recipe
    streams = open_streams(data, recipe.sources, "train", inputs.model.vocab_size, recipe.packing)
    T = recipe.sequence_length
    samples = {name: stream.num_samples(T) for name, stream in streams.items()}
    return {name: samples[name] * T if stream.has_loss_mask else stream.tokens for name, stream in streams.items()}


def _write_files(options: argparse.Namespace, plan: "Plan", tables: list, charts: list) -> None:
    from tinyllama_ds.planning.charts import plan_figure
    from tinyllama_ds.planning.page import plan_page

    if options.picture:
        write_figure(plan_figure(plan), options.picture)
    if options.html:
        write_file(options.html, plan_page(plan, tables, charts))


def _how_to_start(options: argparse.Namespace, best: "Plan") -> str:
    config = options.write_config or "FILE (--write-config FILE writes it)"
    flags = f" --activation-checkpointing {best.work.recompute_every}" if best.work.recompute_every else ""
    flags += f" --sequence-parallel {options.sequence_parallel}" if options.sequence_parallel > 1 else ""
    flags += f" --compile {options.compile}" if options.compile != "auto" else ""
    return f"\n\nstart it with: pretrain --deepspeed-config {config}{flags}"


def _result(plan: "Plan", ranking: "Ranking | None") -> dict:
    """The plan for programs: bytes, seconds, tokens, plain numbers throughout."""
    duration, memory, timeline = plan.duration, plan.memory, plan.timeline
    return {
        "recipe": plan.inputs.recipe.name,
        "layout": asdict(plan.layout),
        "micro_batch": plan.work.micro_batch,
        "sequence_parallel": plan.work.sequence_parallel,
        "accumulation": list(plan.accumulations),
        "gpus": duration.ranks,
        "steps": plan.inputs.plan.total_steps,
        "tokens": duration.tokens,
        "days": duration.days,
        "gpu_hours": duration.gpu_hours,
        "gpu_hours_per_300b_tokens": duration.gpu_hours_for(300e9),
        "tokens_per_second": duration.tokens_per_second,
        "usd": plan.dollars,
        "memory": {
            "rows": [asdict(row) for row in (*memory.rows, *memory.overhead_rows)],
            "total": memory.total,
            "capacity": plan.request.machines.gpu.memory_bytes,
            "fits": plan.fits,
        },
        "step_seconds": [
            {name: getattr(step, name) for name in ("compute", "communication", "exposed", "optimizer")}
            for step in plan.steps
        ],
        "communication": [_traffic_result(part) for part in plan.steps[0].traffic],
        "borders": [asdict(milestone) for milestone in timeline.milestones],
        "tokens_by_source": timeline.tokens_by_source,
        "epochs": timeline.epochs,
        "failures": [asdict(expectation) for expectation in plan.failures],
        "storage": asdict(plan.storage) | {"total": plan.storage.total},
        "deepspeed_config": plan.resolved,
        "warnings": plan.warnings,
        **({"ranking": [_candidate_result(candidate) for candidate in ranking.candidates]} if ranking else {}),
    }


def _traffic_result(part: "Traffic") -> dict:
    collective = asdict(part.collective)
    collective["hides_behind"] = collective.pop("overlaps_with")  # the key that programs know
    return asdict(part) | {"collective": collective}


def _candidate_result(candidate: "Plan") -> dict:
    return {
        "layout": candidate.layout.name,
        "micro_batch": candidate.work.micro_batch,
        "activation_checkpointing": candidate.work.recompute_every,
        "tokens_per_second_per_gpu": candidate.longest_step.tokens_per_second_per_gpu,
        "memory": candidate.memory.total,
    }


COMMANDS = (("plan", _add_plan, _plan),)
