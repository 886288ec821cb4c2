"""Shared fixtures: a small tokenizer and a small data directory, made once per session from made-up text."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import fast_folders
import pytest
import torch
from made_up import made_up_text
from registry import unpacked

from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import train_tokenizer

pytest_plugins = ("tiers", "skips", "mutating")


@pytest.fixture(scope="session", autouse=True)
def environment_at_first() -> dict[str, str]:
    """Seen before any other fixture can change it."""
    return dict(os.environ)


@pytest.fixture(autouse=True)
def own_environment(environment_at_first: dict[str, str]) -> Iterator[None]:
    """What tests and fixtures leave in the environment ends with them: a command called in this process tells DeepSpeed
    its rank by variables, which the processes that later tests start would inherit."""
    os.environ.clear()
    os.environ.update(environment_at_first)
    yield
    os.environ.clear()
    os.environ.update(environment_at_first)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """In each of pytest's processes, of which there are more than cores; what a test starts has its own number."""
    torch.set_num_threads(1)


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Makes file systems of some bytes and inodes, of this user, empty."""
    mounted: list[Path] = []

    def make(size: int, inodes: int = 1000) -> Path:
        place = tmp_path_factory.mktemp("disk")
        options = f"size={size},nr_inodes={inodes},mode=750"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            pytest.skip(f"mounting a file system is not permitted here: {finished.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """512 pieces, the vocabulary of the model size `test`."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([made_up_text(seed, 2000) for seed in range(20)], 512, path)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Two prepared sources, `slimpajama` and `starcoderdata`, each with a validation split."""
    return prepare_small_data(tmp_path_factory.mktemp("data"), tokenizer.path)


@pytest.fixture(scope="session")
def fast_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a `tokenizer.json` of 500 pieces, 12 fewer than the model has rows."""
    root = tmp_path_factory.mktemp("fast")
    return prepare_small_data(root, fast_folders.smollm2(root / "tokenizer", 500))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained SmolLM2-135M-Instruct as a Hugging Face folder, for `--real`."""
    from smollm import write_smollm2

    return write_smollm2(tmp_path_factory.mktemp("smollm2") / "hf", tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def wide_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A real sentencepiece model of 32,000 pieces with Llama 2's settings, Mistral's first, for `--real`."""
    found = unpacked(tmp_path_factory.mktemp("packages"), "mistral-common==1.13.1")
    return load_tokenizer(found / "mistral_common" / "data" / "tokenizer.model.v1")


def prepare_small_data(root: Path, tokenizer: Path) -> Path:
    """The same for whoever has a tokenizer file."""
    for number, source in enumerate(("slimpajama", "starcoderdata")):
        fmt = source_format(source)
        for split, documents in (("train", 60), ("validation", 6)):
            directory = root / "raw" / source / split
            directory.mkdir(parents=True)
            texts = [made_up_text(1000 * number + 100 * len(split) + index, 300) for index in range(documents)]
            meta = {"meta": {fmt.subset_field: "RedPajamaC4"}} if fmt.subset_field else {}
            lines = [json.dumps({fmt.text_field: text} | meta) for text in texts]
            (directory / "part.jsonl").write_text("\n".join(lines))
        prepare(Preparation(source, root / "raw" / source, fmt, tokenizer, root / "prepared"))
    return root / "prepared"
