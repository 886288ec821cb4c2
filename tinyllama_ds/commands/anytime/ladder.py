"""The command that trains small models of a recipe and predicts the loss of the large one."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import SECONDS, add_shared, with_absolute_paths, words_of
from tinyllama_ds.commands.placement import add_placement_arguments, read_placement
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.commands.training import add_kernel_arguments
from tinyllama_ds.errors import EXIT_FINISHED, ConfigError, log
from tinyllama_ds.launch.queue import run_queue
from tinyllama_ds.numbers import duration, short_count

if TYPE_CHECKING:
    from tinyllama_ds.ladder.definition import Ladder, Size
    from tinyllama_ds.launch.launcher import Placement
_SHARE_OF_PEAK = 0.15  # that small models reach, roughly, until the first one is measured
_HERE = ""  # the only place of a ladder without a hostfile
_PAGE = "ladder.html"


def _add_passed_on(parser: argparse.ArgumentParser) -> None:
    """What every size is started with as well."""
    add_shared(parser, "--data")
    add_kernel_arguments(parser)
    add_placement_arguments(parser)
    add = parser.add_argument
    add("--skip-doctor", action="store_true", help="start without the checks of doctor")
    add("--step-timeout", type=SECONDS, default=600, metavar="SECONDS", help="as in pretrain")


def _add_ladder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ladder", metavar="LADDER", help="TOML file, or the name of a shipped one")
    add_shared(parser, "--run-dir", help="directory of the ladder: a run per size, the fit and its page")
    _add_passed_on(parser)
    parser.add_argument("--dry-run", action="store_true", help="show sizes, FLOPs and time, and start nothing")
    add_shared(parser, "--json")


def _ladder(options: argparse.Namespace) -> int:
    """Train small models of a recipe, a run each, and predict the final loss of the large one with its interval."""
    from tinyllama_ds.ladder.definition import load_ladder
    from tinyllama_ds.ladder.fit import require_scipy
    from tinyllama_ds.ladder.page import sizes_table
    from tinyllama_ds.ladder.runs import check_validation, is_finished

    require_scipy()
    if options.no_ssh:
        raise ConfigError("--no-ssh: starts one host of a run; expected a hostfile whose hosts are reached by ssh")
    ladder, placement = load_ladder(options.ladder), read_placement(options)
    check_validation(ladder.recipe, options.data)
    rate, source = _expected_rate(placement)
    table = sizes_table(ladder, rate, source)
    if options.dry_run:
        return print_result(options, {"sizes": _as_rows(ladder, rate)}, table.as_text())
    log(table.as_text())
    _write_inputs(ladder, options.run_dir)
    missing = [size for size in ladder.sizes if not is_finished(options.run_dir / size.name)]
    if len(missing) < len(ladder.sizes):
        log(f"{len(ladder.sizes) - len(missing)} of {len(ladder.sizes)} sizes are finished already")
    code = _train(ladder, missing, options, [host.name for host in placement.hosts] or [_HERE])
    return code if code != EXIT_FINISHED else _fit(ladder, options)


def _expected_rate(placement: "Placement") -> tuple[float, str]:
    """FLOP/s of all ranks here, and where that is from; 0 for other hosts."""
    if placement.is_remote:
        return 0.0, ""
    import torch

    from tinyllama_ds.train.engine import supports_fast_bf16
    from tinyllama_ds.train.utilization import peak_flops

    device = torch.device("cpu" if placement.on_cpu else "cuda")
    peak, source = peak_flops(device, torch.bfloat16 if supports_fast_bf16(device) else torch.float32)
    ranks = 1 if placement.on_cpu else placement.world_size  # a product on CPUs takes all cores
    total = _SHARE_OF_PEAK * peak * ranks
    return total, f"Time: at {_SHARE_OF_PEAK:.0%} of {ranks * peak / 1e12:.2f} TFLOP/s ({source})."


def _as_rows(ladder: "Ladder", rate: float) -> list[dict]:
    T = ladder.recipe.sequence_length
    return [
        {
            "size": size.name,
            "parameters": size.model.num_parameters,
            "tokens": list(size.tokens),
            "learning_rate": size.learning_rate,
            "flops": size.flops(T),
            "seconds": size.flops(T) / rate if rate else None,
        }
        for size in ladder.sizes
    ]


def _write_inputs(ladder: "Ladder", directory: Path) -> None:
    """Recipe and DeepSpeed JSON of each size; raises `ConfigError` where those of a different ladder are there."""
    from tinyllama_ds.ladder.runs import config_of, recipe_of
    from tinyllama_ds.run.decay import write_once

    directory.mkdir(parents=True, exist_ok=True)
    for size in ladder.sizes:
        write_once(directory / f"{size.name}.toml", recipe_of(ladder, size))
        write_once(directory / f"{size.name}.json", json.dumps(config_of(ladder, size), indent=2) + "\n")


def _train(ladder: "Ladder", missing: "list[Size]", options: argparse.Namespace, hosts: list[str]) -> int:
    """Train what is missing, the largest first where hosts share the work; returns an exit code."""
    ordered = missing if len(hosts) == 1 else missing[::-1]
    commands = {size.name: partial(_command, size.name, options) for size in ordered}
    started = partial(_announce, ladder, {size.name: size for size in ordered}, options.run_dir)
    return run_queue(commands, hosts, options.run_dir, started)


def _command(name: str, options: argparse.Namespace, host: str) -> list[str]:
    directory = options.run_dir.absolute()
    placed = argparse.Namespace(**vars(with_absolute_paths(options)))
    if host != _HERE:
        placed.include, placed.exclude = host, None
    return [
        *(sys.executable, "-m", "tinyllama_ds.cli", "pretrain"),
        *("--recipe", f"{directory / name}.toml", "--deepspeed-config", f"{directory / name}.json"),
        *("--run-dir", str(directory / name), *words_of(_add_passed_on, placed)),
    ]


def _announce(ladder: "Ladder", sizes: "Mapping[str, Size]", directory: Path, name: str) -> None:
    """With the time left for this size and those after it, at the rate of the finished ones."""
    from tinyllama_ds.ladder.runs import flops_rate, is_finished

    T, names = ladder.recipe.sequence_length, list(sizes)
    rates = [flops_rate(directory / size.name, size, T) for size in ladder.sizes if is_finished(directory / size.name)]
    left = sum(sizes[other].flops(T) for other in names[names.index(name) :])
    time = f"; about {duration(left / max(rates))} left for all" if any(rates) else ""
    size = sizes[name]
    log(
        f"ladder: {name}, {names.index(name) + 1} of {len(names)}: {short_count(size.model.num_parameters)} parameters,"
        f" {short_count(size.tokens[-1])} tokens{time}"
    )


def _fit(ladder: "Ladder", options: argparse.Namespace) -> int:
    from tinyllama_ds.ladder.page import held_out_table, ladder_page, law_table, verdict
    from tinyllama_ds.ladder.result import fit_ladder, warnings_of, write_result
    from tinyllama_ds.ladder.runs import measurements
    from tinyllama_ds.outputs import write_file
    from tinyllama_ds.report.history import read_history

    directory = options.run_dir
    result = fit_ladder(ladder.name, ladder.recipe, measurements(directory, ladder))
    write_result(directory, result)
    histories = {size.name: read_history(directory / size.name) for size in ladder.sizes}
    write_file(directory / _PAGE, ladder_page(ladder, result, histories))
    tables, warnings = (held_out_table(result), law_table(result)), warnings_of(result)
    lines = [*(f"warning: {warning}" for warning in warnings), verdict(result), str(directory / _PAGE)]
    text = "\n\n".join([*(table.as_text() for table in tables), "\n".join(lines)])
    sources = {
        source: {
            "prediction": asdict(fitted.predictions(result.parameters, [result.tokens])[0]),
            "law": fitted.fit.named,
            "held_out": [asdict(held) for held in fitted.held_out],
            "finished_models": [asdict(one) for one in fitted.measurements],
        }
        for source, fitted in result.sources.items()
    }
    found = {"parameters": result.parameters, "tokens": result.tokens, "sources": sources, "warnings": warnings}
    return print_result(options, found | {"page": str(directory / _PAGE)}, text)


COMMANDS = (("ladder", _add_ladder, _ladder),)
