"""TinyLlama in its real size, randomly initialised: out and in again bit for bit, within 6 GB of memory."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from launching import TIMEOUT, run

from tinyllama_ds.checkpoint.format import CheckpointManifest, OptimizerRecord, Progress
from tinyllama_ds.checkpoint.save import write_file
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.hf.model_folder import open_model_folder, write_model_folder
from tinyllama_ds.hf.weights import digest, parameter_shapes
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import LlamaForCausalLM

pytestmark = pytest.mark.real
CONFIG = MODEL_SIZES["tinyllama-1.1b"]
MOST = 6e9  # bytes
# A command, and then the most memory that it had resident, mapped files included.
MEASURED = """
import sys
from tinyllama_ds.cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


def peak_bytes(*arguments: object) -> int:
    finished = run([sys.executable, "-c", MEASURED, *map(str, arguments)], timeout=10 * TIMEOUT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    *said, peak = finished.stdout.splitlines()
    print(*said, f"peak {int(peak) * 1024 / 1e9:.2f} GB", sep="\n")
    return 1024 * int(peak)


def random_tensors(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for name, shape in parameter_shapes(CONFIG).items():
        tensor = torch.empty(shape).normal_(std=0.02, generator=generator)
        yield name, (tensor + 1 if len(shape) == 1 else tensor).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_round_trip_is_bit_for_bit(dtype: torch.dtype, wide_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    written = write_model_folder(tmp_path / "ours", random_tensors(dtype), CONFIG, wide_tokenizer)
    assert peak_bytes("export", tmp_path / "ours", tmp_path / "hf") < MOST
    assert peak_bytes("import", tmp_path / "hf", tmp_path / "again") < MOST
    before, after = (open_model_folder(tmp_path / name) for name in ("ours", "again"))
    assert after.model == before.model == CONFIG
    assert after.files == before.files
    assert {name: digest(tensor) for name, tensor in after.tensors()} == written.digests
    if dtype == torch.float32:
        compare_logits(tmp_path)


def compare_logits(root: Path) -> None:
    """Ours from the folder that came back, theirs from the one between."""
    with torch.device("meta"):
        ours = LlamaForCausalLM(CONFIG, "eager")
    ours.load_state_dict(dict(open_model_folder(root / "again").tensors()), assign=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "hf", attn_implementation="eager")
    ids = torch.randint(CONFIG.vocab_size, (1, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
    print(f"largest logit {expected.abs().max():.3f}, largest difference {(found - expected).abs().max():.1e}")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def write_checkpoint(run_dir: Path, dtype: torch.dtype, tokenizer: Tokenizer) -> dict[str, str]:
    """A checkpoint of two ranks under ZeRO-3, without the moments, which export never reads."""
    folder = run_dir / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (run_dir / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    digests = {}
    files = {}
    for rank in range(2):
        fragments = {}
        for name, tensor in random_tensors(torch.float32):
            digests[name] = digest(tensor.to(dtype))
            half = tensor.numel() // 2
            start, stop = rank * half, tensor.numel() if rank else half
            fragments[f"master/{name}[{start}:{stop}]"] = tensor.flatten()[start:stop].clone()
        path = folder / f"rank_{rank:05d}.master.safetensors"
        files[path.name] = write_file(path, fragments)
    shapes = {name: list(shape) for name, shape in parameter_shapes(CONFIG).items()}
    run = {"data": {"train": {"a": {"tokenizer_sha256": tokenizer.sha256}}}}
    manifest = CheckpointManifest(
        Progress(1, 1, 2048), 2, 3, str(dtype).removeprefix("torch."), CONFIG.to_dict(), run,
        shapes, OptimizerRecord("AdamW", 1, []), files,
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_exported_within_6_gb(dtype: torch.dtype, wide_tokenizer: Tokenizer, tmp_path: Path) -> None:
    digests = write_checkpoint(tmp_path / "run", dtype, wide_tokenizer)
    assert peak_bytes("export", tmp_path / "run", tmp_path / "hf", "--max-shard-size", "1GB") < MOST
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    peak_bytes("import", tmp_path / "hf", tmp_path / "ours")
    assert {name: digest(tensor) for name, tensor in open_model_folder(tmp_path / "ours").tensors()} == digests
