"""GPUs by the names that CUDA gives them."""

import pytest

from tinyllama_ds.hardware.gpus import gpu_of_device, known_gpus


@pytest.mark.parametrize(
    ("device_name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("A100-SXM4-40GB", 312),  # by drivers before 460
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_spec_sheet(device_name: str, teraflops: int) -> None:
    gpu = gpu_of_device(device_name)
    assert gpu is not None
    assert gpu.peak_flops == teraflops * 1e12


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA GeForce GTX 1080",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H20",
        "NVIDIA H200 NVL",
        "NVIDIA A10-24Q",
        "NVIDIA RTX 6000 Ada Generation",
    ],
)
def test_a_device_of_a_different_name_has_no_spec_sheet(device_name: str) -> None:
    assert gpu_of_device(device_name) is None


def test_a_device_is_one_gpu() -> None:
    devices = [device for gpu in known_gpus().values() for device in gpu.devices]
    assert len(set(devices)) == len(devices)
