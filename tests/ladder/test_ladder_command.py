"""The command `ladder` from its file to the page, and its predictions in `plan` and `report`."""

import json
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
from ladders import write_ladder

from tinyllama_ds.cli import main
from tinyllama_ds.commands.anytime import ladder as command
from tinyllama_ds.commands.training import add_run_arguments
from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.config.recipe import load_recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import make_schedule
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.ladder.definition import Ladder, load_ladder
from tinyllama_ds.ladder.result import fit_ladder, write_result
from tinyllama_ds.ladder.run_prediction import predict
from tinyllama_ds.ladder.runs import config_of, measurements, recipe_of

LAWS = {"slimpajama": (2.0, 30.0, 0.3, 100.0, 0.4), "starcoderdata": (1.5, 40.0, 0.35, 80.0, 0.35)}


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllama_ds.ladder.result.DRAWS", 10)


def law(source: str, parameters: int, tokens: int) -> float:
    E, A, alpha, B, beta = LAWS[source]
    return E + A / parameters**alpha + B / tokens**beta


def write_run(run_dir: Path, parameters: int, tokens: list[int], recipe: dict | None = None) -> None:
    """What a finished run leaves of its validations, with losses of the law at `tokens` and larger ones between."""
    run_dir.mkdir(parents=True)
    losses = {count: {source: law(source, parameters, count) for source in LAWS} for count in tokens}
    between = {count - 256: {source: loss + 1 for source, loss in losses[count].items()} for count in tokens}
    rows = [
        {"step": count // 256, "tokens": count, "seconds": count / 100, "Train/Loss": 5.0}
        | {f"Validation/Loss/{source}": loss for source, loss in of_sources.items()}
        for count, of_sources in sorted((losses | between).items())
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "status.json").write_text('{"state": "finished"}')
    (run_dir / "run.json").write_text(json.dumps({"recipe": recipe} if recipe else {}))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The file of a ladder whose runs, in the folder `runs`, have all finished."""
    path = write_ladder(tmp_path)
    for size in load_ladder(str(path)).sizes:
        write_run(tmp_path / "runs" / size.name, size.model.num_parameters, list(size.tokens))
    return path


@pytest.fixture
def fitted(finished: Path) -> Path:
    """The directory of that ladder with its fit."""
    ladder, runs = load_ladder(str(finished)), finished.parent / "runs"
    write_result(runs, fit_ladder(ladder.name, ladder.recipe, measurements(runs, ladder)))
    return runs


def run(ladder: Path, data: Path, *more: str) -> int:
    arguments = ["ladder", str(ladder), "--data", str(data), "--run-dir", str(ladder.parent / "runs"), *more]
    return main([*arguments, "--num-gpus", "1"])


def test_each_size_is_a_run_that_finishes_a_model_at_the_end_of_every_stage(tmp_path: Path) -> None:
    ladder: Ladder = load_ladder(str(write_ladder(tmp_path, warmup=0.2, decay=0.25, learning_rate_exponent=-0.5)))
    for size in ladder.sizes:
        (tmp_path / "size.toml").write_text(recipe_of(ladder, size))
        (tmp_path / "size.json").write_text(json.dumps(config_of(ladder, size)))
        recipe, config = load_recipe(str(tmp_path / "size.toml")), load_deepspeed_config(tmp_path / "size.json")
        plan = RunPlan(recipe)
        assert (recipe.model, tuple(plan.stage_end_tokens)) == (size.model, size.tokens)
        assert config["optimizer"]["params"]["lr"] == size.learning_rate
        schedule = make_schedule(config, tmp_path / "size.json", plan)
        assert [schedule.ratio(tokens) for tokens in size.tokens] == [0, 0, 0]
        assert [end - start for start, end in schedule.decays] == [512, 1280, 2560]
        assert schedule.warmup_tokens == 512
        assert all(stage.weights == ladder.recipe.stages[0].weights for stage in recipe.stages)


def test_a_finished_ladder_is_fitted_without_a_launch(
    finished: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The law is exact, so the largest size and the large model are predicted as they are."""
    assert run(finished, data_dir, "--json") == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert "4 of 4 sizes are finished already" in output.err
    large = load_recipe(str(tmp_path / "large.toml"))
    for source, of_source in found["sources"].items():
        truth = law(source, large.model.num_parameters, 25_600)
        assert of_source["prediction"]["loss"] == pytest.approx(truth, abs=2e-3)
        assert of_source["prediction"]["low"] <= truth <= of_source["prediction"]["high"]
        for held in of_source["held_out"]:
            assert held["size"] == "d4"
            assert held["predicted"]["loss"] == pytest.approx(held["measured"], abs=0.02)
    page = Path(found["page"]).read_text()
    assert page.count("<svg") == 5
    assert "Held-out check" in page
    assert "<script" not in page


def test_plan_and_report_show_predicted_losses(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, ladder = tmp_path / "large.toml", str(fitted)
    planned = ["plan", "--recipe", str(recipe), "--deepspeed-config", str(tmp_path / "ds.json"), "--num-gpus", "1"]
    assert main([*planned, "--ladder", ladder, "--html", str(tmp_path / "plan.html"), "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted_losses"]
    large = load_recipe(str(recipe))
    truth = law("slimpajama", large.model.num_parameters, 25_600)
    assert predicted["slimpajama"]["loss"] == pytest.approx(truth, abs=2e-3)
    curve = predict(fitted, large)
    assert curve.at("slimpajama", 1000).loss > curve.at("slimpajama", 10_000).loss > curve.at("slimpajama", 25_600).loss
    assert [row[0] for row in curve.table().rows] == ["6,400", "12,800", "19,200", "25,600"]
    assert (
        "Predicted loss of a model that is finished at so many tokens, slimpajama"
        in (tmp_path / "plan.html").read_text()
    )

    write_run(tmp_path / "run", large.model.num_parameters, [12_800, 25_600], large.to_dict())
    assert main(["report", str(tmp_path / "run"), "--ladder", ladder, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["predicted_losses"]["slimpajama"]
    assert compared["measured"] == truth
    assert compared["tokens"] == 25_600
    assert "Predicted and measured loss" in (tmp_path / "run" / "report.html").read_text()


def test_a_ladder_that_cannot_predict_is_rejected(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = ["plan", "--recipe", "tinyllama-v1.1-chinese", "--deepspeed-config", "zero3", "--ladder"]
    assert main([*planned, str(tmp_path / "none")]) == EXIT_CONFIG
    assert "ladder.json: is missing; expected the --run-dir of a finished" in capsys.readouterr().err
    assert main([*planned, str(fitted)]) == EXIT_CONFIG
    assert "ladder mine: was not trained on skypile" in capsys.readouterr().err
    assert main(["report", str(fitted / "d1"), "--ladder", str(fitted)]) == EXIT_CONFIG
    assert "--ladder: the run's recipe is not in its run.json" in capsys.readouterr().err


def test_another_ladder_in_the_same_directory_is_rejected(
    finished: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command._write_inputs(load_ladder(str(finished)), tmp_path / "runs")
    assert run(write_ladder(tmp_path, decay=0.2), data_dir) == EXIT_CONFIG
    assert "d1.json: differs from what this command writes" in capsys.readouterr().err
    write_ladder(tmp_path)
    rows = (tmp_path / "runs" / "d2" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs" / "d2" / "metrics.jsonl").write_text("".join(rows[:-1]))
    assert run(finished, data_dir) == EXIT_CONFIG
    assert "d2/metrics.jsonl: has no validation loss of slimpajama at 10,240 tokens" in capsys.readouterr().err


def test_a_larger_model_that_is_worse_is_a_warning(
    finished: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "runs" / "d4" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[-1]["Validation/Loss/slimpajama"] += 3
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(finished, data_dir) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "slimpajama: d4 is worse than d3 by 2." in warnings[0]
    assert "slimpajama: d4 is worse than d3 by 2." in (tmp_path / "runs" / "ladder.html").read_text()


def test_data_without_validation_is_rejected_before_anything_is_written(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "starcoderdata" / "validation")
    assert run(write_ladder(tmp_path), tmp_path / "data") == EXIT_CONFIG
    assert "starcoderdata/validation: has no shards" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_sizes_and_starts_nothing(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_ladder(tmp_path)
    assert run(path, data_dir, "--dry-run", "--json") == 0
    sizes = json.loads(capsys.readouterr().out)["sizes"]
    assert [size["size"] for size in sizes] == ["d1", "d2", "d3", "d4"]
    assert all(size["seconds"] > 0 and size["tokens"] == [2560, 5120, 10_240] for size in sizes)
    assert sizes[1]["flops"] == load_ladder(str(path)).recipe.model.flops_per_token(32) * 10_240
    assert run(path, data_dir, "--dry-run") == 0
    assert "To predict small" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_size_is_started_by_pretrain_on_one_host(data_dir: Path, tmp_path: Path) -> None:
    parser = ArgumentParser()
    command._add_ladder(parser)
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=2\nnode2 slots=2\n")
    given = ["mine.toml", "--data", str(data_dir), "--run-dir", str(tmp_path / "runs"), "--compile", "off"]
    options = parser.parse_args([*given, "--hostfile", str(hosts), "--skip-doctor"])
    words = command._command("d2", options, "node2")
    assert words[words.index("pretrain") + 1 :][:6] == [
        *("--recipe", str(tmp_path / "runs" / "d2.toml"), "--deepspeed-config", str(tmp_path / "runs" / "d2.json")),
        *("--run-dir", str(tmp_path / "runs" / "d2")),
    ]
    assert words[words.index("--include") + 1] == "node2"
    assert {"--hostfile", "--skip-doctor", "--compile"} <= set(words)
    rank = ArgumentParser()
    add_run_arguments(rank)
    known, rest = rank.parse_known_args(words[words.index("pretrain") + 1 :])
    assert (known.compile, rest) == ("off", ["--hostfile", str(hosts), "--include", "node2", "--skip-doctor"])
