"""What a run needs, costs and will do, by arithmetic alone: no torch, no DeepSpeed, no data read."""
