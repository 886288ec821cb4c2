"""What a launcher starts on every rank: `deepspeed --module`, `torchrun -m` and `srun python -m` take these modules."""
