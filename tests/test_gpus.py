"""GPUs by the names that CUDA gives them."""

import pytest

from tinyllama_ds.gpus import gpu_of_device


@pytest.mark.parametrize(
    ("device_name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_the_peak_of_a_device_is_its_data_sheets(device_name: str, teraflops: int) -> None:
    gpu = gpu_of_device(device_name)
    assert gpu is not None
    assert gpu.peak_flops == teraflops * 1e12


def test_an_unknown_device_has_no_data_sheet() -> None:
    assert gpu_of_device("NVIDIA GeForce GTX 1080") is None
