"""The command that reports on runs: one as a page and a picture, or several next to each other."""

import argparse
from pathlib import Path

from tinyllama_ds.commands.arguments import Number, add_shared, output_file, output_picture
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.outputs import check_file, check_picture, write_figure, write_file


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run directory; several are compared")
    add("--output", type=output_file, metavar="HTML", help="default: RUN/report.html, of several ./comparison.html")
    add("--picture", type=output_picture, metavar="PNG", help="of one run the main curves (default: RUN/report.png)")
    add("--price-per-hour", type=Number(least=0, most=1e6), metavar="USD", help="of one GPU, to compare cost")
    add("--ladder", type=Path, metavar="DIR", help="of one run: finished ladder that predicted its losses")
    add_shared(parser, "--json")


def _report(options: argparse.Namespace) -> int:
    """Write a run's report as one HTML page and its curves as a picture, or compare several runs on one page."""
    return _report_one(options, *options.runs) if len(options.runs) == 1 else _compare(options)


def _report_one(options: argparse.Namespace, run: Path) -> int:
    from tinyllama_ds.checkpoint.format import newest_progress
    from tinyllama_ds.ladder.run_prediction import compare
    from tinyllama_ds.launch.lock import is_held
    from tinyllama_ds.report.charts import run_figure
    from tinyllama_ds.report.history import read_history
    from tinyllama_ds.report.run_page import report_page, summarize

    history = read_history(run)
    compared = compare(options.ladder, history) if options.ladder else None
    _, committed = newest_progress(run)
    summary = summarize(history, committed, is_held(run))
    output = options.output or check_file(run / "report.html")
    picture = options.picture or check_picture(run / "report.png")
    shown = (compared.tables(), compared.charts()) if compared else ([], [])
    write_file(output, report_page(history, summary, str(run), *shown))
    write_figure(run_figure(history, str(run)), picture)
    figures = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    text = "\n".join(f"{name:<40} {value:>14,.4g}" for name, value in figures.items())
    result = summary | {"page": str(output), "picture": str(picture)}
    if compared:
        result |= {"predicted_losses": compared.as_dict()}
        text = "\n".join([text, *(table.as_text() for table in compared.tables())])
    return print_result(options, result, f"{text}\n{summary['verdict']}\n{output}\n{picture}")


def _compare(options: argparse.Namespace) -> int:
    from tinyllama_ds.report.comparison import comparison_page, comparison_table, differences, figures_of
    from tinyllama_ds.report.history import read_history
    from tinyllama_ds.report.sample_losses import differences_of_losses, loss_table

    for name in ("picture", "ladder"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}: is of one run; expected no more than one of {len(options.runs)}")
    resolved = list(dict.fromkeys(path.resolve() for path in options.runs))
    is_clear = len({path.name for path in resolved}) == len(resolved)
    places = {path.name if is_clear else str(path): path for path in resolved}
    runs = {name: read_history(path) for name, path in places.items()}
    losses = differences_of_losses(runs, places)
    figures = {name: figures_of(history, options.price_per_hour) for name, history in runs.items()}
    output = options.output or check_file("comparison.html")
    write_file(output, comparison_page(runs, figures, losses))
    table, rows = comparison_table(figures), differences(runs)
    result = {
        "runs": figures,
        "differences": {key: dict(zip(runs, values, strict=True)) for key, *values in rows},
        "validation": [difference.to_dict() for difference in losses],
        "page": str(output),
    }
    by_source = f"{loss_table(losses).as_text()}\n" if losses else ""
    return print_result(options, result, f"{table.as_text()}\n{by_source}{len(rows)} settings differ\n{output}")


COMMANDS = (("report", _add_report, _report),)
