"""Around the deepspeed launcher: hostfile, preflight checks, supervision."""
