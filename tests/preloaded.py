"""Everything that a rank or a command imports, imported once: by the server of `forked`, before it forks."""

import gc

import deepspeed  # noqa: F401
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  (DeepSpeed imports it with the first optimizer)
import pytest  # noqa: F401
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import tinyllama_ds.cli
import tinyllama_ds.commands.training
import tinyllama_ds.planning.fit
import tinyllama_ds.train.pretrain  # noqa: F401

gc.collect()
gc.freeze()  # a collection in a fork looks at what the fork has made
