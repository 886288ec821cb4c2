"""The parts of `on_gpu.py`: one module each, run as a process of its own that stores its figures as it goes."""
