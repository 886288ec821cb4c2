#!/usr/bin/env python
"""What `tinyllama-ds doctor` starts on every rank to measure the network."""

import argparse

from tinyllama_ds.training.all_reduce import main
from tinyllama_ds.training.engine import leave

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--local_rank", type=int, help="appended by the launcher; the environment is what counts")
    leave(main(parser.parse_args().mebibytes))
