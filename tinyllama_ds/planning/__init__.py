"""Memory, time, cost and timeline of a run by arithmetic: no torch, no DeepSpeed, no data read."""
