"""Which backend a run gets, and what is said where a faster one is absent, broken or unfit."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forked import on_ranks
from torch.nn import attention as torch_attention

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.attention import (
    ATTENTION_BACKENDS,
    Demands,
    Device,
    MissingKernel,
    attention_function,
    capability_of,
    resolve_attention_backend,
)

CPU, A100, H100, V100 = Device("cpu"), Device("cuda", (8, 0)), Device("cuda", (9, 0)), Device("cuda", (7, 0))
BF16, FP32 = Demands(sixteen_bit=True), Demands(sixteen_bit=False)
BF16_MASKED = Demands(sixteen_bit=True, document_mask=True)


@pytest.mark.parametrize("device", [CPU, A100, Device("cuda")], ids=str)
def test_unknown_backend_is_rejected(device: Device) -> None:
    with pytest.raises(ConfigError, match="'flash' is unknown; choose auto"):
        resolve_attention_backend("flash", device, BF16)


@pytest.mark.parametrize("demands", [BF16, FP32, BF16_MASKED], ids=str)
def test_auto_is_blocked_on_a_cpu(demands: Demands) -> None:
    choice = resolve_attention_backend("auto", CPU, demands)
    assert (choice.backend, choice.reason) == ("blocked", "")


@pytest.mark.parametrize("name", ["auto", *ATTENTION_BACKENDS])
def test_what_only_the_ranks_can_know_is_left_to_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head node has neither the GPU nor its packages."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was started"))
    strictest = Demands(sixteen_bit=False, document_mask=True, deterministic=True)
    choice = resolve_attention_backend(name, Device("cuda"), strictest)
    assert (choice.backend, choice.reason) == (name, "")


NOT_INSTALLED = "flash_attention_2: flash_attn is not installed"
MASK_KEPT = "every block keeps a mask of tokens x tokens"


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed here")
@pytest.mark.parametrize(
    ("device", "demands", "backend", "reason"),
    [
        (A100, BF16, "sdpa", NOT_INSTALLED),
        (H100, BF16, "sdpa", NOT_INSTALLED),
        (A100, BF16_MASKED, "varlen", NOT_INSTALLED),
        (
            A100,
            Demands(sixteen_bit=False, document_mask=True),
            "sdpa",
            f"flash_attention_2: computes in bf16 or fp16, and the training is in fp32; {MASK_KEPT}",
        ),
        (V100, BF16, "sdpa", "flash_attention_2: has no kernel for a GPU of compute capability 7.0"),
        (
            V100,
            BF16_MASKED,
            "sdpa",
            f"flash_attention_2: has no kernel for a GPU of compute capability 7.0; {MASK_KEPT}",
        ),
    ],
)
def test_auto_without_packages(device: Device, demands: Demands, backend: str, reason: str) -> None:
    choice = resolve_attention_backend("auto", device, demands)
    assert (choice.backend, choice.reason) == (backend, reason)


@pytest.mark.gpu
def test_auto_takes_what_works_on_this_gpu() -> None:
    gpu = Device("cuda", capability_of(torch.device("cuda", 0)))
    choice = resolve_attention_backend("auto", gpu, BF16)
    assert (choice.backend == "sdpa") == bool(choice.reason)
    assert resolve_attention_backend("auto", gpu, FP32).backend == "sdpa"


@pytest.mark.parametrize(
    ("name", "device", "demands", "sentence"),
    [
        ("sdpa_cudnn", CPU, BF16, "needs a GPU"),
        ("varlen", CPU, BF16, "needs a GPU"),
        ("flash_attention_2", CPU, BF16, "needs a GPU"),
        ("sdpa_flash", H100, FP32, "computes in bf16 or fp16, and the training is in fp32"),
        ("varlen", H100, FP32, "computes in bf16 or fp16, and the training is in fp32"),
        ("varlen", V100, BF16, "has no kernel for a GPU of compute capability 7.0"),
        ("flash_attention_3", A100, BF16, "has no kernel for a GPU of compute capability 8.0"),
        ("flash_attention_4", A100, BF16, "has no kernel for a GPU of compute capability 8.0"),
        ("sdpa_flash", H100, BF16_MASKED, "does not support a mask, and the recipe has document_mask = true"),
        ("sdpa_cudnn", H100, Demands(True, deterministic=True), "has no deterministic gradients"),
    ],
)
def test_a_backend_that_cannot_do_it_is_rejected(name: str, device: Device, demands: Demands, sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"^attention backend '{name}' {sentence}[^;]*; choose auto or sdpa$"):
        resolve_attention_backend(name, device, demands)


@pytest.mark.parametrize("name", ["varlen", "sdpa", "sdpa_flash"])
def test_a_backend_that_can_be_deterministic_is_not_rejected_for_it(name: str) -> None:
    assert resolve_attention_backend(name, H100, Demands(True, deterministic=True)).backend == name


PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@pytest.mark.parametrize("name", [*PACKAGES, "flash_attention_4"])
def test_absent_package_that_was_asked_for_is_an_error(name: str) -> None:
    module = PACKAGES.get(name, "flash_attn.cute.interface")
    if find_spec(module.partition(".")[0]):
        pytest.skip(f"{module} is installed here")
    with pytest.raises(ConfigError, match=f"^attention backend '{name}': {module} is not installed; install"):
        resolve_attention_backend(name, H100, BF16)


UNDEFINED_SYMBOL = "flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocation"
BROKEN = {  # what `module/__init__.py` does, and what is said of it
    "another torch's": (f"raise ImportError({UNDEFINED_SYMBOL!r})", f"ImportError: {UNDEFINED_SYMBOL}"),
    "no shared object": (
        "import ctypes, pathlib\nctypes.CDLL(str(pathlib.Path(__file__).with_name('kernels.so')))",
        "OSError: ",
    ),
    "no extension module": ("from . import kernels", "ImportError: "),
    "an operator's schema": ("raise RuntimeError('duplicate registrations for flash_attn::_fwd')", "RuntimeError: dup"),
    "a missing dependency": ("import a_package_that_nobody_has", "No module named 'a_package_that_nobody_has'"),
}


def print_choices(name: str, packages: str) -> None:
    sys.path.insert(0, packages)
    device, masked = Device("cuda", (9, 0)), Demands(sixteen_bit=True, document_mask=True)
    print(resolve_attention_backend("auto", device, Demands(sixteen_bit=True)))
    print(resolve_attention_backend("auto", device, masked))
    try:
        resolve_attention_backend(name, device, masked)
    except ConfigError as error:
        print(error)


@pytest.mark.parametrize(
    ("name", "case"), [*(("flash_attention_2", case) for case in BROKEN), ("flash_attention_3", "another torch's")]
)
def test_a_package_that_does_not_import_is_passed_over_and_rejected_by_name(
    name: str, case: str, tmp_path: Path
) -> None:
    module = PACKAGES[name]
    source, said = BROKEN[case]
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(source)
    (tmp_path / module / "kernels.so").write_bytes(b"\x7fELF, but no more of it")
    finished = on_ranks(print_choices, name, str(tmp_path), ranks=1)
    assert finished.returncode == 0, finished.stderr
    rows, documents, refusal = finished.stdout.splitlines()
    assert rows.startswith("AttentionChoice(backend='sdpa'")
    assert documents.startswith("AttentionChoice(backend='varlen'")
    for line in (rows, documents):
        assert f"{name}: {module} does not import (" in line
        assert said in line.replace("\\", "")
    assert refusal.startswith(f"attention backend '{name}': {module} does not import (")
    assert said in refusal


def test_a_package_without_its_functions_is_one_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 4 alone leaves a folder `flash_attn` that has none of FlashAttention 2."""
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed here")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(MissingKernel, match="flash_attn does not import .*has no attribute 'flash_attn_func'"):
            attention_function("flash_attention_2")
    finally:
        sys.modules.pop("flash_attn", None)


# The operators that PyTorch asks of FlashAttention 3; early releases of the package had them elsewhere.
OPERATORS = """
import torch
library = torch.library.Library("flash_attn_3", "FRAGMENT")
for name in {names}:
    library.define(f"{{name}}(Tensor q) -> Tensor")
"""


def print_activated(packages: str) -> None:
    sys.path.insert(0, packages)
    choice = resolve_attention_backend("auto", Device("cuda", (9, 0)), Demands(sixteen_bit=True))
    for _ in range(2):
        attention_function(choice.backend)
    print(choice.backend, torch.nn.attention.current_flash_attention_impl(), choice.reason)


@pytest.mark.parametrize("names", [("fwd", "bwd"), ("fwd",)], ids=str)
def test_flash_attention_3_is_activated_inside_pytorch(names: tuple[str, ...], tmp_path: Path) -> None:
    if find_spec("flash_attn_interface"):
        pytest.skip("flash_attn_interface is installed here")
    if "FA3" not in torch_attention.list_flash_attention_impls():
        pytest.skip("this torch cannot activate FlashAttention 3")
    (tmp_path / "flash_attn_interface.py").write_text(OPERATORS.format(names=names))
    finished = on_ranks(print_activated, str(tmp_path), ranks=1)
    assert finished.returncode == 0, finished.stderr
    if "bwd" in names:
        assert finished.stdout.strip() == "flash_attention_3 FA3"
    else:
        assert finished.stdout.startswith(
            "sdpa None flash_attention_3: flash_attn_interface cannot be used (RuntimeError: Module"
        )
