"""Whether ranks get a GPU, and which: the decisions, fed with what PyTorch, CUDA and nvidia-smi say."""

import pytest
import torch

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.devices import (
    Machine,
    VisibleGpus,
    common_machine,
    cpu_has_bf16,
    device_index,
    device_type_of,
    hidden_gpus,
    list_gpus,
    machine_of,
    reject_unsupported,
)
from tinyllama_ds.train.engine import supports_fast_bf16

A100 = {"name": "NVIDIA A100-SXM4-40GB", "mib": "40960", "used_mib": "3", "driver": "470.57.02", "capability": [8, 0]}
T4 = {"name": "Tesla T4", "mib": "15360", "used_mib": "0", "driver": "550.54.14", "capability": [7, 5]}
# c10/cuda/CUDAFunctions.cpp of torch 2.11, cudaErrorInsufficientDriver.
TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU"
    " driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
    " Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your version"
    " of the CUDA driver. (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)

UNKNOWN = (  # the same file, cudaErrorUnknown
    "CUDA initialization: CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env"
    " variable CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero. (Triggered"
    " internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)


def gpus(
    visible: str | None = None, count: int = 0, listed: int = 0, accelerator: str | None = None, **more: str
) -> VisibleGpus:
    return VisibleGpus(accelerator, visible, count, "2.11.0+cu130", "13.0", listed=(A100,) * listed, **more)


@pytest.mark.parametrize(
    ("what", "device_type"),
    [
        (gpus(), "cpu"),  # a laptop
        (gpus(visible="0,1"), "cpu"),  # there under DeepSpeed's launcher
        (gpus(count=8), "cuda"),
        (gpus(visible="2,3", count=2), "cuda"),
        (gpus(visible="MIG-3e9b7d1f-1234-5678-9abc-def012345678", count=1, listed=1), "cuda"),
        (gpus(visible="GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", count=1, listed=8), "cuda"),
        (gpus(visible="", listed=8), "cpu"),
        (gpus(visible="-1", listed=8), "cpu"),
        (gpus(count=8, accelerator="cpu"), "cpu"),
        (gpus(listed=8, accelerator="cpu", warning=TOO_OLD), "cpu"),
    ],
)
def test_the_kind_of_device(what: VisibleGpus, device_type: str) -> None:
    assert device_type_of(what) == device_type


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (gpus(visible="0,,2", count=1, listed=8), "CUDA_VISIBLE_DEVICES is '0,,2': '' is not a GPU"),
        (gpus(visible="0,-1", count=1, listed=8), "'-1' is not a GPU"),
        (gpus(visible="0;1", listed=8), "'0;1' is not a GPU"),
        (gpus(visible="all", listed=8), "'all' is not a GPU"),
        (gpus(visible="0,0", listed=8), "lists GPU 0 twice"),
        (gpus(visible="7", listed=1), "there is no GPU 7; expected 0 to 0 on this machine"),
        (gpus(visible="0,1", count=1, listed=1), "there is no GPU 1; expected 0 to 0 on this machine"),
        (
            gpus(listed=8, warning=TOO_OLD),
            "torch 2.11.0+cu130 for CUDA 13.0 cannot use 8 x NVIDIA A100-SXM4-40GB of this machine with driver"
            " 470.57.02 (The NVIDIA driver on your system is too old (found version 11040)); update the driver,"
            ' install a torch for it, or hide the GPUs with CUDA_VISIBLE_DEVICES="" to train on the CPU',
        ),
        (
            gpus(warning=UNKNOWN),
            "cannot use GPUs of this machine (CUDA unknown error - this may be due to an incorrectly set up"
            " environment, e.g. changing env variable CUDA_VISIBLE_DEVICES after program start);",
        ),
        (gpus(warning=TOO_OLD), "cannot use GPUs of this machine (The NVIDIA driver"),
        (gpus(listed=8), "cannot use 8 x NVIDIA A100-SXM4-40GB of this machine with driver 470.57.02; update"),
        (
            VisibleGpus(None, None, 0, "2.13.0+cpu", None, listed=(A100,)),
            "torch 2.13.0+cpu is built without CUDA, and this",
        ),
    ],
)
def test_gpus_are_never_left_idle_in_silence(what: VisibleGpus, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        device_type_of(what)
    assert sentence in str(error.value)


def test_hidden_gpus_are_spoken_of() -> None:
    assert hidden_gpus(gpus(visible="", listed=8)) == (
        "CUDA_VISIBLE_DEVICES is '', which hides this machine's 8 GPUs; computing on the CPU"
    )
    assert hidden_gpus(gpus(visible="")) is None
    assert hidden_gpus(gpus(visible="", listed=8, accelerator="cpu")) is None


@pytest.mark.parametrize(
    ("what", "local_rank", "local_size", "index"),
    [
        (gpus(count=8), 5, 8, 5),
        (gpus(count=8), 5, None, 5),
        (gpus(visible="5", count=1), 5, 8, 0),  # srun --gpus-per-task=1
        (gpus(visible="0", count=1), 7, None, 0),  # the same where cgroups number the devices of a task
        (gpus(visible="2,3", count=2), 1, 2, 1),
    ],
)
def test_a_rank_gets_a_device_of_its_own(
    what: VisibleGpus, local_rank: int, local_size: int | None, index: int
) -> None:
    assert device_index(what, local_rank, local_size) == index


@pytest.mark.parametrize(
    ("what", "local_rank", "local_size"), [(gpus(count=2), 2, None), (gpus(count=2), 0, 4), (gpus(count=1), 1, None)]
)
def test_ranks_never_share_a_device(what: VisibleGpus, local_rank: int, local_size: int | None) -> None:
    with pytest.raises(ConfigError, match="ranks on this host, and PyTorch sees . GPUs; expected one GPU per rank"):
        device_index(what, local_rank, local_size)


# What the wheel of torch 2.11 for CUDA 13.0 was built for, and an older list.
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "architectures", "is_fit"),
    [
        ((8, 0), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # Ada runs what was built for 8.6
        ((9, 0), CUDA_13, True),
        ((7, 0), CUDA_13, False),  # V100
        ((6, 1), CUDA_13, False),
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, False),
        ((13, 0), [*CUDA_13, "compute_120"], True),  # which its driver compiles
        ((12, 0), CUDA_12, False),
        ((9, 0), ["sm_90a"], True),
        ((8, 6), ["sm_89"], False),
    ],
)
def test_a_gpu_needs_kernels(capability: tuple[int, int], architectures: list[str], is_fit: bool) -> None:
    if is_fit:
        reject_unsupported("GPU", capability, architectures, "2.11.0")
        return
    with pytest.raises(ConfigError, match=r"GPU has compute capability \d+\.\d, and torch 2.11.0 is built for sm_"):
        reject_unsupported("GPU", capability, architectures, "2.11.0")


def test_hosts_are_of_one_kind() -> None:
    big, small = (machine_of({"gpus": [gpu], "cores": cores, "bf16": False}) for gpu, cores in ((A100, 64), (T4, 8)))
    assert common_machine({"node1": big}) == Machine("cuda", True, 64, (8, 0))
    assert common_machine({"node1": big, "node2": small}) == Machine("cuda", False, 8, (7, 5))
    none = machine_of({"gpus": [], "cores": 2, "bf16": True})
    assert common_machine({"node1": none}) == Machine("cpu", True, 2)
    with pytest.raises(ConfigError, match="node1 has GPUs and node2 has none that nvidia-smi lists"):
        common_machine({"node1": big, "node2": none})


def test_a_driver_that_tells_no_capability_is_taken_for_the_first_with_bf16() -> None:
    assert machine_of({"gpus": [A100 | {"capability": None}], "cores": 1, "bf16": False}).bf16


def test_the_cpu_is_judged_as_pytorch_judges_it() -> None:
    capabilities = torch.cpu.get_capabilities()
    expected = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    assert cpu_has_bf16() == supports_fast_bf16(torch.device("cpu")) == expected
    assert cpu_has_bf16("processor\t: 0\nflags\t\t: fpu avx512f amx_tile amx_bf16\n")
    assert not cpu_has_bf16("processor\t: 0\nflags\t\t: fpu avx512f\n")


def test_without_nvidia_smi_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert list_gpus() == []
