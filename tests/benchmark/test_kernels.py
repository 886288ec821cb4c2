"""Kernels are told apart by the names that PyTorch, cuBLAS, CUTLASS, cuDNN, flash-attn, Triton and NCCL give them."""

import pytest
import torch

from tinyllama_ds.benchmark.kernels import KINDS, break_down, kind_of, summarize

ADAM = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::"
NAMES = {
    "gemm": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_hsh_192x192_64x4_2x1_v_bz_coopB_NTN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nt_align8>(cutlass_80)",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16, float, false>(...)",
        "triton_tem_fused_mm_3",
        "aten::mm",
        "aten::bmm",
        "aten::addmm",
        "mkldnn::_linear_pointwise",
    ],
    "attention": [
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t>>",
        "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128, 128, 8>>",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 64, 4>>",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "optimizer": [
        f"{ADAM}FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float>>",
        "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float, float, int>, float, float>",
        f"{ADAM}TensorListMetadata<1>, at::native::(anonymous namespace)::LpNormFunctor<float, NormType::L2>>",
        "aten::_fused_adamw_",
    ],
    "copies": [
        "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(TensorIteratorBase&)>",
        f"{ELEMENTWISE}bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::lambda>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<OpaqueType<2u>, unsigned int, 1>",
        f"{ADAM}TensorListMetadata<2>, at::native::(anonymous namespace)::Copy<float, c10::BFloat16, 2, 1, 1>>",
        "aten::copy_",
        "aten::_to_copy",
    ],
    "collectives": [
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "gloo:all_reduce",
    ],
    "elementwise": [
        "triton_poi_fused__to_copy_mul_silu_2",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "triton_per_fused_native_layer_norm_backward_1",
        f"{ELEMENTWISE}CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>",
        "void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, float, float, 11, false>",
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, unsigned int, 2>",
        "void at::native::embedding_backward_feature_kernel<c10::BFloat16, float, long>",
        "aten::mul",
        "## Call CompiledFxGraph fxyz ##",
    ],
    "other": ["void some_kernel_of_tomorrow<64>", "autograd::engine::evaluate_function: AddBackward0"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_the_kind_of_a_kernel_follows_from_its_name(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def event(category: str, name: str, start: float, duration: float, thread: int = 7) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 0, "tid": thread}


def test_a_gpus_trace_counts_kernels_gaps_and_calls_of_the_host() -> None:
    """Two streams overlap, and what the host did meanwhile is not time of the GPU."""
    found = summarize(
        [
            event("kernel", "nvjet_tst_128x256_64x4", 0, 100),
            event("kernel", "ncclDevKernel_AllGather_RING_LL", 50, 100, thread=20),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 200, 50),
            event("cpu_op", "aten::mm", 0, 1000, thread=1),
            event("cuda_runtime", "cudaLaunchKernel", 0, 5, thread=1),
            event("cuda_runtime", "cudaStreamSynchronize", 5, 5, thread=1),
            event("cuda_runtime", "cudaStreamSynchronize", 15, 5, thread=1),
            event("cuda_runtime", "cudaMemcpyAsync", 25, 5, thread=1),
            {"ph": "i", "cat": "kernel", "name": "an instant, without a duration", "ts": 0},
        ]
    )
    assert found["count"] == 3
    assert found["busy_seconds"] == pytest.approx(200e-6)
    assert {kind: figures["count"] for kind, figures in found["kinds"].items() if figures["count"]} == {
        "collectives": 1, "copies": 1, "gemm": 1
    }  # fmt: skip
    assert found["kinds"]["gemm"]["seconds"] == pytest.approx(100e-6)
    assert found["host_calls"] == {"cudaMemcpyAsync": 1, "cudaStreamSynchronize": 2}


def test_an_operator_on_a_cpu_counts_with_its_self_time() -> None:
    found = summarize(
        [
            event("cpu_op", "aten::add", 10, 20),
            event("cpu_op", "aten::linear", 0, 100),
            event("cpu_op", "aten::mm", 30, 60),
            event("cpu_op", "aten::mm", 30, 60, thread=8),
        ]
    )
    assert found["kinds"]["gemm"] == {"count": 3, "seconds": pytest.approx(140e-6)}
    assert found["kinds"]["elementwise"] == {"count": 1, "seconds": pytest.approx(20e-6)}
    assert found["busy_seconds"] == pytest.approx(100e-6)


def test_a_real_trace_has_the_product_that_was_made() -> None:
    a = torch.randn(512, 512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            (a @ a).add(1)
    found = break_down(profiler)
    assert set(found["kinds"]) == set(KINDS)
    assert found["kinds"]["gemm"]["count"] >= 3
    assert found["kinds"]["elementwise"]["count"] >= 3
    total = sum(figures["seconds"] for figures in found["kinds"].values())
    assert 0 < found["kinds"]["gemm"]["seconds"] <= total
    assert total == pytest.approx(found["busy_seconds"], rel=1e-2)
