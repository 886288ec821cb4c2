"""Every attention backend: time of forward and backward, with and without documents, and the error against fp32."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_parts.common import Part, part_of_arguments
from gpu_parts.machine import seconds
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.attention import (
    ATTENTION_BACKENDS,
    Demands,
    Device,
    attention_function,
    attention_metadata,
    capability_of,
    eager_attention,
    resolve_attention_backend,
)


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H query heads and K of keys and values, E numbers each; documents in every sequence."""

    B: int
    T: int
    H: int
    K: int
    E: int
    documents: int

    @property
    def flops(self) -> int:
        """Forward and backward without documents: two products and five, of which causality halves each."""
        return 7 * self.B * self.H * self.T**2 * self.E

    def inputs(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the output, random."""
        heads = (self.H, self.K, self.K, self.H)
        tensors = [torch.randn(self.B, self.T, count, self.E, device=device).to(dtype) for count in heads]
        return [tensor.requires_grad_(number < 3) for number, tensor in enumerate(tensors)]

    def document_ids(self, device: str) -> Tensor:
        """The number of each token's document, (B, T), borders at random."""
        borders = torch.rand(self.B, self.T, device=device) < self.documents / self.T
        return borders.int().cumsum(1).int()


TIMED = {False: Shape(8, 2048, 32, 4, 64, 8), True: Shape(1, 256, 8, 2, 64, 4)}  # by whether it is rehearsed
COMPARED = {False: Shape(2, 512, 32, 4, 64, 4), True: Shape(1, 128, 8, 2, 64, 4)}
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def outputs(attend: Attend, tensors: list[Tensor], documents: Tensor | None) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v, upstream = tensors
    out = attend(q, k, v, documents)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def error(name: str, part: Part, with_documents: bool) -> float:
    """Of the worst of output and gradients in bf16, against attention that is written out in fp32: a relative norm."""
    torch.manual_seed(1)
    shape = COMPARED[part.rehearse]
    tensors = shape.inputs(part.device, torch.bfloat16)
    document_ids = shape.document_ids(part.device) if with_documents else None
    exact = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]
    expected = outputs(eager_attention, exact, document_ids)
    documents = attention_metadata(name, document_ids) if document_ids is not None else None
    found = outputs(attention_function(name), tensors, documents)
    norms = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return max(norms)


def milliseconds(name: str, part: Part, with_documents: bool) -> float:
    """Forward and backward of one layer's attention."""
    shape = TIMED[part.rehearse]
    tensors = shape.inputs(part.device, torch.bfloat16)
    documents = attention_metadata(name, shape.document_ids(part.device)) if with_documents else None
    attend = attention_function(name)
    return 1000 * seconds(lambda: outputs(attend, tensors, documents), torch.device(part.device), 3)


def report(name: str, part: Part) -> None:
    """Both ways, in one line that grows; a way that a backend does not know is said in its place."""
    flops = TIMED[part.rehearse].flops
    told = []
    for with_documents in (False, True):
        way = "documents" if with_documents else "causal"
        try:
            taken, wrong = milliseconds(name, part, with_documents), error(name, part, with_documents)
        except (RuntimeError, ValueError, ConfigError) as failure:
            traceback.print_exc()
            part.figures.put(f"{name}.{way}.error", str(failure))
            gist = str(failure).strip().splitlines()[0][:60]
            told.append(f"{way}: {gist}")
        else:
            part.figures.put(f"{name}.{way}", {"milliseconds": taken, "relative_error": wrong})
            rate = "" if with_documents else f" ({flops / taken / 1e9:,.0f} TFLOP/s)"
            told.append(f"{way} {taken:.2f} ms{rate}, error {wrong:.1e}")
        part.figures.put(f"{name}.told", told, f"{name:<18}{'; '.join(told)}")
        if part.device == "cuda":
            torch.cuda.synchronize()  # an illegal access shows here, and ends this process
            torch.cuda.empty_cache()


def main(part: Part) -> int:
    """One backend after the other. After a crash of the GPU's context a new process goes on with the others."""
    for name in ATTENTION_BACKENDS:
        if f"{name}.begun" in part.figures.values:
            continue
        part.figures.put(f"{name}.begun", True)
        try:
            device = Device(part.device, capability_of(torch.device(part.device)))
            resolve_attention_backend(name, device, Demands(sixteen_bit=True))
        except ConfigError as error:
            part.figures.put(f"{name}.rejected", str(error), f"{name:<18}not here: {error}"[:130])
            continue
        try:
            report(name, part)
        except Exception as failure:  # whatever a kernel does, the others are measured
            traceback.print_exc()
            part.figures.check(f"{name}.ran", False, f"{name}: {str(failure).strip().splitlines()[0][:80]}")
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, "-m", "gpu_parts.attention", *sys.argv[1:]])
    return part.figures.end()


if __name__ == "__main__":
    sys.exit(main(part_of_arguments("attention")))
