"""One CUDA device on a machine without any: tensors asked for on `cuda` are host tensors with a label.

Under `FakeCuda` PyTorch and DeepSpeed believe in one GPU. An operator that CUDA refuses because its tensors lie on
different devices raises here too: 0-dim host tensors are taken by pointwise operators alone, host indices by `index`,
and NCCL takes no host tensor at all. What makes the host wait for a GPU is recorded in `waits`, with the line that
caused it: `.item()`, `.tolist()`, `bool(tensor)`, shapes that depend on data, and copies that are not asynchronous,
which to and from pageable memory none is.

What it cannot tell: kernels, memory and speed, whether a kernel exists for a dtype, and races between streams.
"""

import contextlib
import functools
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
import torch.utils.checkpoint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).parents[1] / "tinyllama_ds"
DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
NAME = "NVIDIA H100 80GB HBM3"
MEMORY_BYTES = 80 * 2**30
_COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
_TAKE_HOST_NUMBERS = {"fill_"}  # beside the pointwise ones
_TAKE_HOST_INDICES = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_SHAPE_DEPENDS_ON_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
_READ_ONE_VALUE = {"_local_scalar_dense", "equal", "is_nonzero"}
_LABEL_OF_FIRST = {"set_", "resize_", "detach", "alias", "view", "_unsafe_view"}  # nothing is computed


class Wait(NamedTuple):
    """The host waits until the GPU has caught up."""

    what: str
    where: str  # file:function, the innermost of the package
    inside: str  # file:line, the innermost of all but PyTorch's


class MixedDevices(RuntimeError):
    """As CUDA says: expected all tensors to be on the same device."""


class FakeCuda:
    """A context: everything inside runs as on a machine with one GPU. `waits` is what the host waited for so far.

    What tensors hold there together beyond `memory_bytes` is out of memory.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.waits: list[Wait] = []
        self._capability = capability
        self.registered: dict[int, int] = {}  # bytes by address, of host memory that was pinned after it was made
        self.memory_bytes = MEMORY_BYTES
        self._labels: dict[int, tuple[StorageWeakRef, str, int]] = {}  # and bytes
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "FakeCuda":
        # The compiler would look for a GPU's code generator.
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(_patched(torch.cuda, _cuda_functions(self)))
        self._stack.enter_context(_patched(torch, {"load": self._load(torch.load)}))
        methods = {"pin_memory": lambda tensor, *_: self.pin(tensor.clone()), "record_stream": lambda *_: None}
        self._stack.enter_context(_patched(torch.Tensor, methods))
        self._stack.enter_context(_patched(dist, _collectives()))
        # Recomputed tensors are compared with those of the forward pass, which were looked at from below the label.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        self._stack.enter_context(mock.patch.dict(checks, default=lambda x: {"shape": x.shape, "dtype": x.dtype}))
        self._stack.enter_context(_patched(threading.Thread, {"run": self._in_thread(threading.Thread.run)}))
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def label(self, tensor: torch.Tensor) -> str:
        """`cuda`, `pinned` or `host`."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._labels:
            return self._labels[storage._cdata][1]
        return "pinned" if self.registered and storage.data_ptr() in self.registered else "host"

    def is_cuda(self, tensor: torch.Tensor) -> bool:
        return self.label(tensor) == "cuda"

    def mark(self, tensor: torch.Tensor, label: str) -> torch.Tensor:
        """Label the memory behind a tensor. A reference keeps its address from being given to other memory."""
        storage = tensor.untyped_storage()
        with self._lock:
            if label == "host":
                self._labels.pop(storage._cdata, None)
            else:
                self._labels[storage._cdata] = (StorageWeakRef(storage), label, storage.nbytes())
            if len(self._labels) > 50_000 or self.memory_bytes < MEMORY_BYTES:
                self._labels = {key: entry for key, entry in self._labels.items() if not entry[0].expired()}
        if label == "cuda" and self.memory_bytes < MEMORY_BYTES and self.held_bytes() > self.memory_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {self.held_bytes()} bytes are held.")
        return tensor

    def held_bytes(self) -> int:
        """What tensors hold on the device now."""
        return sum(size for _, label, size in self._labels.values() if label == "cuda")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.mark(tensor, "pinned")

    def wait(self, what: str) -> None:
        self.waits.append(Wait(what, *_lines()))

    def copied(self, source: str, target: str, is_blocking: bool) -> None:
        """Note a copy between two labels; it is asynchronous only between the GPU and pinned memory, when asked."""
        if {source, target} == {"cuda"} or "cuda" not in (source, target):
            return
        if _is_in_collective():
            return  # of gloo, which is not NCCL
        if is_blocking or "host" in (source, target):
            pageable = "pageable " if "host" in (source, target) else ""
            self.wait(f"{pageable}copy from {source} to {target}")

    def _in_thread(self, original: Any) -> Any:
        """Modes hold for one thread each, so every new one enters its own."""

        def run(thread: threading.Thread) -> None:
            with _Operators(self), _Calls(self):
                original(thread)

        return run

    def _load(self, original: Any) -> Any:
        def load(file: Any, map_location: Any = None, **options: Any) -> Any:
            wanted = map_location if isinstance(map_location, str | torch.device) else HOST
            loaded = original(file, map_location="cpu", **options)
            if torch.device(wanted).type == "cuda":
                for tensor in tree_leaves(loaded):
                    if isinstance(tensor, torch.Tensor):
                        self.mark(tensor, "cuda")
            return loaded

        return load


class _Operators(TorchDispatchMode):
    """Sees every operator that runs, those of the backward pass and of collectives included."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        is_made_there = kwargs.get("device") is not None and _type_of(kwargs["device"]) == "cuda"
        if is_made_there:
            kwargs["device"] = HOST
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        labels = [self._gpu.label(tensor) for tensor in tensors]
        self._check(func, name, tensors, labels)
        self._note_waits(name, args, kwargs, labels)
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        out = func(*args, **kwargs)
        if name in ("copy_", "_foreach_copy_"):
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in storages:
                self._gpu.mark(tensor, "cuda" if "cuda" in labels or is_made_there else "host")
        return out

    def _check(self, func: Any, name: str, tensors: list, labels: list[str]) -> None:
        if func.namespace == "c10d":
            if name != "barrier" and any(label != "cuda" for label in labels):  # whose tensor is its own
                raise MixedDevices(f"c10d::{name}: NCCL takes tensors on CUDA alone, got {_describe(tensors, labels)}")
            return
        if "cuda" not in labels or set(labels) == {"cuda"} or name in _COPIES or name in _LABEL_OF_FIRST:
            return
        hosts = [tensor for tensor, label in zip(tensors, labels, strict=True) if label != "cuda"]
        takes_numbers = torch.Tag.pointwise in func.tags or name in _TAKE_HOST_NUMBERS
        if takes_numbers and all(tensor.dim() == 0 for tensor in hosts) and not _writes_to_host(func, labels):
            return
        if name in _TAKE_HOST_INDICES and labels[0] == "cuda":
            return
        raise MixedDevices(
            f"{name}: expected all tensors to be on the same device, got {_describe(tensors, labels)}"
            f" in {' at '.join(_lines())}"
        )

    def _note_waits(self, name: str, args: tuple, kwargs: dict, labels: list[str]) -> None:
        if name == "copy_":
            is_blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            self._gpu.copied(labels[1], labels[0], is_blocking)
        elif "cuda" in labels and (name in _SHAPE_DEPENDS_ON_DATA or name in _READ_ONE_VALUE):
            self._gpu.wait(name)
        elif name in _TAKE_HOST_INDICES and "cuda" in labels:
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._gpu.wait(f"{name} by a mask")
            elif any(self._gpu.label(index) == "host" for index in indices):
                self._gpu.wait(f"{name} by indices in host memory")


def _writes_to_host(func: Any, labels: list[str]) -> bool:
    """Whether an operator that works in place would write a result of the GPU into a host tensor."""
    return func._schema.is_mutable and labels[0] != "cuda"


class _Calls(TorchFunctionMode):
    """Sees every call of PyTorch's functions and methods: gives `device="cuda"` its meaning."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, self._gpu, func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in ("to", "cuda", "cpu") and args and isinstance(args[0], torch.Tensor):
            return self._move(name, func, args, kwargs)
        return self._make(func, args, kwargs)

    def _make(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A function that may make a tensor on a device of the caller's choice."""
        device, is_pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        label = self._gpu.label(args[0]) if func is torch.Tensor.new_tensor else None
        if device is not None:
            kind = _type_of(device)
            label = {"cuda": "cuda", "cpu": "host"}.get(kind)
            if kind == "cuda":
                kwargs["device"] = HOST
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and (label or is_pinned):
            wanted = "pinned" if is_pinned else label
            if self._is_another(out, wanted, args):
                self._gpu.copied(self._gpu.label(out), wanted, is_blocking=True)
                out = out.clone()
            self._gpu.mark(out, wanted)
        return out

    def _is_another(self, out: torch.Tensor, wanted: str, args: tuple) -> bool:
        """Whether a function such as `as_tensor` hands back its argument, which lies elsewhere."""
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        is_same = any(out.untyped_storage()._cdata == tensor.untyped_storage()._cdata for tensor in given)
        return is_same and (self._gpu.label(out) == "cuda") != (wanted == "cuda")

    def _move(self, name: str, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        tensor, rest = args[0], list(args[1:])
        target = "cuda" if name == "cuda" else "host" if name == "cpu" else None
        for position, value in enumerate(rest):
            if isinstance(value, torch.Tensor):
                target = self._gpu.label(value)
            elif isinstance(value, str | torch.device):
                target, rest[position] = "cuda" if _type_of(value) == "cuda" else "host", HOST
        if kwargs.get("device") is not None:
            target, kwargs["device"] = "cuda" if _type_of(kwargs["device"]) == "cuda" else "host", HOST
        if _type_of(tensor.untyped_storage().device) == "meta":
            return func(*args, **kwargs)
        source = self._gpu.label(tensor)
        non_blocking = bool(kwargs.pop("non_blocking", False))
        out = tensor if name in ("cuda", "cpu") else func(tensor, *rest, **kwargs)
        if target is None or (target == "cuda") == (source == "cuda"):
            return out
        self._gpu.copied(source, target, not non_blocking)
        moved = out.clone() if out.untyped_storage()._cdata == tensor.untyped_storage()._cdata else out
        return self._gpu.mark(moved, target)


def _type_of(device: Any) -> str:
    return "cuda" if isinstance(device, int) else torch.device(device).type


def _describe(tensors: list, labels: list[str]) -> str:
    return ", ".join(f"{tuple(tensor.shape)} on {label}" for tensor, label in zip(tensors, labels, strict=True))


def _is_in_collective() -> bool:
    frame: Any = sys._getframe(1)
    for _ in range(10):
        frame = frame and frame.f_back
        if frame and frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return True
    return False


def _lines() -> tuple[str, str]:
    """The innermost line of the package in the stack, and the innermost that is not PyTorch's."""
    frame: Any = sys._getframe(2)
    inside = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_ours = PACKAGE in path.parents
        if not inside and path != Path(__file__) and "torch" not in path.parts[:-1]:
            inside = f"{path.name}:{frame.f_lineno}"
        if is_ours:
            return f"{path.relative_to(PACKAGE.parent)}:{frame.f_code.co_name}", inside
        frame = frame.f_back
    return inside, inside


def _device_of(mode: _Calls, gpu: FakeCuda, func: Any, args: tuple, kwargs: dict) -> Any:
    return DEVICE if gpu.is_cuda(args[0]) else func(*args, **kwargs)


def _backward(mode: _Calls, gpu: FakeCuda, func: Any, args: tuple, kwargs: dict) -> None:
    """Hooks and recomputed blocks run inside, which have to see the device; PyTorch's own function would hide it."""
    gradient = kwargs.get("gradient") or (args[1] if len(args) > 1 else None)
    keep_graph, create_graph = bool(kwargs.get("retain_graph")), bool(kwargs.get("create_graph"))
    with mode:
        start = torch.ones_like(args[0]) if gradient is None else gradient
        torch.autograd.Variable._execution_engine.run_backward(
            (args[0],), (start,), keep_graph, create_graph, (), allow_unreachable=True, accumulate_grad=True
        )


def _deepcopy(mode: _Calls, gpu: FakeCuda, func: Any, args: tuple, kwargs: dict) -> Any:
    return gpu.mark(func(*args, **kwargs), gpu.label(args[0]))


def _type(mode: _Calls, gpu: FakeCuda, func: Any, args: tuple, kwargs: dict) -> Any:
    out = func(*args, **kwargs)
    return out.replace("torch.", "torch.cuda.") if isinstance(out, str) and gpu.is_cuda(args[0]) else out


def _to_list(mode: _Calls, gpu: FakeCuda, func: Any, args: tuple, kwargs: dict) -> Any:
    if gpu.is_cuda(args[0]):
        gpu.wait("tolist")
    return func(*args, **kwargs)


def _to_numpy(mode: _Calls, gpu: FakeCuda, func: Any, args: tuple, kwargs: dict) -> Any:
    if gpu.is_cuda(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return func(*args, **kwargs)


_SPECIAL: dict[Any, Any] = {
    torch.Tensor.device.__get__: _device_of,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda mode, gpu, func, args, kwargs: gpu.is_cuda(args[0]),  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda mode, gpu, func, args, kwargs: not gpu.is_cuda(args[0]),  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda mode, gpu, func, args, kwargs: 0 if gpu.is_cuda(args[0]) else -1,
    torch.Tensor.is_pinned: lambda mode, gpu, func, args, kwargs: gpu.label(args[0]) == "pinned",
    torch.Tensor.backward: _backward,
    torch.Tensor.__deepcopy__: _deepcopy,
    torch.Tensor.type: _type,
    torch.Tensor.tolist: _to_list,
    torch.Tensor.numpy: _to_numpy,
    torch.Tensor.__array__: _to_numpy,
}


@contextlib.contextmanager
def _patched(owner: Any, attributes: dict[str, Any]) -> Iterator[None]:
    missing = object()
    before = {name: getattr(owner, name, missing) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _cuda_functions(gpu: FakeCuda) -> dict[str, Any]:
    """What of `torch.cuda` our code, transformers and DeepSpeed call."""

    class Stream:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def synchronize(self) -> None:
            gpu.wait("Stream.synchronize")

        def wait_stream(self, stream: object) -> None: ...

        def wait_event(self, event: object) -> None: ...

        def record_event(self, event: "Event | None" = None) -> "Event":
            return event or Event()

        def query(self) -> bool:
            return True

    class Event:
        def __init__(self, *_: object, **__: object) -> None:
            self._is_recorded = False

        def record(self, stream: object = None) -> None:
            self._is_recorded = True

        def synchronize(self) -> None:
            gpu.wait("Event.synchronize")

        def wait(self, stream: object = None) -> None: ...

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: "Event") -> float:
            return 1.0

    @contextlib.contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    def register(address: int, size: int, _: int) -> int:
        gpu.registered[address] = size
        return 0

    def unregister(address: int) -> int:
        del gpu.registered[address]
        return 0

    the_stream = Stream()
    properties = types.SimpleNamespace(
        name=NAME, total_memory=MEMORY_BYTES, major=gpu._capability[0], minor=gpu._capability[1],
        multi_processor_count=132,
    )  # fmt: skip
    none = lambda *_, **__: None  # noqa: E731
    memory = {
        name: lambda *_, **__: 0
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    }
    return memory | {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": none,
        "_lazy_call": none,
        "init": none,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": none,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: gpu._capability,
        "get_device_properties": lambda *_: properties,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "is_bf16_supported": lambda *_, **__: gpu._capability >= (8, 0),
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": none,
        "empty_cache": none,
        "ipc_collect": none,
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": lambda *_: the_stream,
        "default_stream": lambda *_: the_stream,
        "manual_seed": none,
        "manual_seed_all": none,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": none,
        "is_current_stream_capturing": lambda: False,
        "nvtx": types.SimpleNamespace(range_push=none, range_pop=none),
        "cudart": lambda: types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister),
        "check_error": none,
    }


def _collectives() -> dict[str, Any]:
    """NCCL is gloo that says it is NCCL; which tensors it takes is checked where its operators run."""
    init, original_backend = dist.init_process_group, dist.get_backend

    @functools.wraps(init)
    def init_process_group(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        init("gloo", *args, **kwargs)

    return {
        "init_process_group": init_process_group,
        "get_backend": lambda group=None: "nccl" if original_backend(group) == "gloo" else original_backend(group),
    }
