"""What happens around a training step, one callback per module; `registry` lists them in execution order."""
