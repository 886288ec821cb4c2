#!/usr/bin/env python
"""For `deepspeed ... scripts/pretrain.py` in a checkout; everywhere, `--module tinyllama_ds.rank.pretrain`."""

from tinyllama_ds.rank.pretrain import main

if __name__ == "__main__":
    main()
