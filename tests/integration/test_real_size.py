"""TinyLlama in its real size, randomly initialised: out and in again bit for bit, within 6 GB of memory."""

import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from launching import TIMEOUT, run
from llama2 import LLAMA2, needs_llama2

from tinyllama_ds.checkpoint.format import CheckpointManifest, File, Progress
from tinyllama_ds.hf.model_folder import open_model_folder, write_model_folder
from tinyllama_ds.hf.weights import digest, parameter_shapes
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import LlamaForCausalLM

pytestmark = [pytest.mark.real, needs_llama2]
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
def test_the_round_trip_is_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    written = write_model_folder(tmp_path / "ours", random_tensors(dtype), CONFIG, LLAMA2)
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


def write_checkpoint(run_dir: Path, stage: int, dtype: torch.dtype) -> dict[str, str]:
    """A checkpoint of two ranks as DeepSpeed writes it, without the moments, which export never touches."""
    shapes = OrderedDict(parameter_shapes(CONFIG))
    folder = run_dir / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (run_dir / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    module = {} if stage == 3 else dict(random_tensors(dtype))
    said = {"buffer_names": [], "param_shapes": [shapes], "shared_params": {}, "ds_version": "0.19.8", "module": module}
    prefix = "zero_pp_rank_0_mp_rank_00" if stage == 3 else "mp_rank_00"
    torch.save(said, folder / f"{prefix}_model_states.pt")
    del said, module
    parts: list[list[torch.Tensor]] = [[], []]
    digests = {}
    for name, tensor in random_tensors(torch.float32):
        digests[name] = digest(tensor.to(dtype))
        for part, piece in zip(parts, tensor.flatten().chunk(2), strict=True):
            part.append(piece if stage == 3 else tensor.flatten())
    flat = [torch.cat(part) for part in parts] if stage == 3 else torch.cat(parts[0]).chunk(2)
    del parts
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank, partition in enumerate(flat):
        state = {"zero_stage": stage, "partition_count": 2, key: [partition.clone()]}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    commit(folder, stage, dtype)
    return digests


def commit(folder: Path, stage: int, dtype: torch.dtype) -> None:
    files = {}
    for path in folder.iterdir():
        with path.open("rb") as file:
            files[path.name] = File(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    name = str(dtype).removeprefix("torch.")
    said = {"data": {"train": {}}}
    manifest = CheckpointManifest(Progress(1, 1, 2048), 2, stage, name, CONFIG.to_dict(), said, files)
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))


@pytest.mark.parametrize(("stage", "dtype"), [(3, torch.float32), (3, torch.bfloat16), (1, torch.bfloat16)])
def test_a_checkpoint_is_exported_within_6_gb(stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    digests = write_checkpoint(tmp_path / "run", stage, dtype)
    assert peak_bytes("export", tmp_path / "run", tmp_path / "hf", "--max-shard-size", "1GB") < MOST
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    peak_bytes("import", tmp_path / "hf", tmp_path / "ours")
    assert {name: digest(tensor) for name, tensor in open_model_folder(tmp_path / "ours").tensors()} == digests
