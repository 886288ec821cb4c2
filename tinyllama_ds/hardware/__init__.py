"""What ranks compute on: the devices of a machine, and spec sheets of GPUs and networks."""
