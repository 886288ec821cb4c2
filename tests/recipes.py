"""A small valid recipe, for tests that change it."""

VALID = """
name = "mine"
model = "test"
sequence_length = 32
seed = 1
validation_samples = 4
[[stages]]
name = "only"
tokens = 6400
global_batch_tokens = 320
weights = { slimpajama = 1 }
[intervals]
log_steps = 1
evaluate_tokens = 640
save_tokens = 640
"""
