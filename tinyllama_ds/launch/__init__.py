"""What happens around the deepspeed launcher: hostfile and supervision."""
