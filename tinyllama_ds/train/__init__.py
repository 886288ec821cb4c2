"""The training loop and the DeepSpeed engine that it drives: the only package that imports deepspeed."""
