"""The quickstart from an empty directory, by the commands of a package that was built and installed: no checkout."""

import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from functools import partial
from pathlib import Path

import pytest
from launching import TIMEOUT, read_series, write_recipe

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"


def call(command: list[object], where: Path, **environment: str) -> str:
    """A program that sees nothing of this checkout; what it prints."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    finished = subprocess.run(
        [*map(str, command)], cwd=where, env=variables, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def call_program(program: Path, where: Path, *words: str) -> str:
    return call([program, *words], where, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist of the files that git would give to others."""
    folder = tmp_path_factory.mktemp("packages")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    return {kind: build(kind, folder / "source", folder) for kind in ("sdist", "wheel")}


def build(kind: str, source: Path, folder: Path) -> Path:
    """A package of a source tree, in a folder."""
    return folder / call([sys.executable, "-c", BUILD.format(kind, str(folder))], source).splitlines()[-1]


def install(package: Path, folder: Path) -> Path:
    """The folder of programs of a new environment with this package, and with the libraries of this one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = Path(call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (purelib / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--no-cache-dir", "--quiet"]
    call([sys.executable, "-m", "pip", "--python", python, "install", *options, package], folder)
    found = call([python, "-c", "import tinyllama_ds; print(tinyllama_ds.__file__)"], folder)
    assert Path(found.strip()).is_relative_to(purelib)
    return folder / "bin"


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_of_the_sdist_is_the_wheel_of_the_repository(packages: dict[str, Path], tmp_path: Path) -> None:
    archive = packages["sdist"]
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    again = tmp_path / "again"
    again.mkdir()
    rebuilt = build("wheel", tmp_path / archive.name.removesuffix(".tar.gz"), again)
    files = files_of(packages["wheel"])
    assert files_of(rebuilt) == files
    for folder in ("ds_configs", "hostfiles"):
        for path in (ROOT / folder).iterdir():
            assert files[f"tinyllama_ds/{folder}/{path.name}"] == path.read_bytes()


@pytest.mark.parametrize("kind", ["wheel", pytest.param("sdist", marks=pytest.mark.all_faults)])
def test_the_quickstart_needs_no_checkout(kind: str, packages: dict[str, Path], tmp_path: Path) -> None:
    program = install(packages[kind], tmp_path / "venv") / "tinyllama-ds"
    here = tmp_path / "empty"
    here.mkdir()
    toolkit = partial(call_program, program, here)
    toolkit("demo-data", "raw", "--source", "starcoderdata", "skypile")
    toolkit("train-tokenizer", "--input", "raw/starcoderdata", "--vocab-size", "512", "--output", "tokenizer.model")
    for source in ("starcoderdata", "skypile"):
        prepared = ("--input", f"raw/{source}", "--tokenizer", "tokenizer.model", "--output", "data")
        toolkit("prepare", "--source", source, *prepared)
    recipe = write_recipe(here / "small.toml", steps=34, save_every=34)
    recipe.write_text(recipe.read_text().replace("slimpajama", "skypile"))
    trained = ("--recipe", recipe.name, "--deepspeed-config", "demo_zero3", "--data", "data", "--run-dir", "run")
    toolkit("pretrain", *trained, "--num-gpus", "2")
    assert len(read_series(here / "run", "Train/Loss")) == 34
    toolkit("export", "run", "hf")
    assert toolkit("generate", "hf", "def load_model(", "--max-new-tokens", "4").startswith("def load_model(")
    planned = toolkit("plan", "--recipe", "tinyllama-v1", "--deepspeed-config", "zero3", "--hostfile", "a100_2x8")
    assert "16 x a100-40g" in planned
