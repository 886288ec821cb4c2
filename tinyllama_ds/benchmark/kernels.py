"""Where the time of a training step goes: kernels by kind, and calls that make the host wait, from a trace."""

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.profiler import profile

# The first that fits counts: flash-attn's kernels name CUTLASS too, and an optimizer's copies are copies.
_KINDS = (
    ("collectives", r"nccl|gloo:|c10d::|all_?gather|all_?reduce|reduce_?scatter"),
    (
        "copies",
        r"memcpy|memset|copy_kernel|::Copy<|CopyFunctor|CatArray|aten::(_to_copy|copy_|_?foreach_copy|clone|cat)\b",
    ),
    ("attention", r"flash|fmha|sdpa|attention|MemEff"),
    ("optimizer", r"adam|multi_tensor_apply|lpnorm|aten::_foreach|aten::linalg_vector_norm"),
    (
        "gemm",
        r"gemm|nvjet|cutlass|xmma|cublas|splitK|triton_tem|mkldnn|aten::(_?mm|t?bmm|addmm|baddbmm|linear|matmul)\b",
    ),
    (
        "elementwise",
        r"triton|elementwise|reduce_kernel|softmax|norm|embedding|index|gather|scatter|distribution|aten::",
    ),
    ("elementwise", r"CompiledFxGraph|Torch-Compiled"),  # on a CPU, where the fused loops have no name of their own
)
KINDS = (*dict.fromkeys(kind for kind, _ in _KINDS), "other")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
_ON_HOST = ("cuda_runtime", "cuda_driver")
_WAIT_OR_COPY = re.compile("Synchronize|Memcpy")


def kind_of(name: str) -> str:
    """The kind of a GPU kernel, or on a CPU of an operator, by its name; one of `KINDS`."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def break_down(profiler: "profile") -> dict[str, Any]:
    """A profiled stretch by kinds: `summarize` of its trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return summarize(json.loads(path.read_text(errors="replace"))["traceEvents"])


def summarize(events: Iterable[dict]) -> dict[str, Any]:
    """Number and seconds of each kind's kernels, the seconds in which any ran, and the host's waits and copies.

    `events` are those of a Chrome trace. Without a GPU's kernels in it, an operator counts with the time that it spent
    outside of other operators.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in spans if event.get("cat") in _ON_DEVICE]
    operators = [event for event in spans if event.get("cat") == "cpu_op"]
    timed = [(event["name"], event["dur"]) for event in kernels] if kernels else _own_times(operators)
    kinds: dict[str, dict[str, float]] = {kind: {"count": 0, "seconds": 0.0} for kind in KINDS}
    for name, duration in timed:
        found = kinds[kind_of(name)]
        found["count"] += 1
        found["seconds"] += duration / 1e6
    calls = Counter(event["name"] for event in spans if event.get("cat") in _ON_HOST)
    return {
        "kinds": kinds,
        "count": len(timed),
        "busy_seconds": _covered(kernels or operators) / 1e6,
        "host_calls": {name: count for name, count in sorted(calls.items()) if _WAIT_OR_COPY.search(name)},
    }


def _own_times(operators: list[dict]) -> list[tuple[str, float]]:
    """Microseconds of every operator without those that it called, thread by thread."""
    threads = defaultdict(list)
    for event in operators:
        threads[event["tid"]].append(event)
    found = []
    for called in threads.values():
        callers: list[tuple[float, list]] = []  # its end, and what is known of it
        for event in sorted(called, key=lambda event: (event["ts"], -event["dur"])):
            while callers and callers[-1][0] <= event["ts"]:
                callers.pop()
            if callers:
                callers[-1][1][1] -= event["dur"]
            own = [event["name"], event["dur"]]
            found.append(own)
            callers.append((event["ts"] + event["dur"], own))
    return [(name, max(0.0, duration)) for name, duration in found]


def _covered(events: list[dict]) -> float:
    """Microseconds in which at least one of the events was under way."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        finish = event["ts"] + event["dur"]
        total += max(0.0, finish - max(end, event["ts"]))
        end = max(end, finish)
    return total
