#!/usr/bin/env python
"""What `tinyllama-ds bench` starts under the deepspeed launcher for each of its settings."""

from pathlib import Path

from tinyllama_ds.benchmark.measure import Setting, main
from tinyllama_ds.commands.arguments import COUNT, Parser, output_file
from tinyllama_ds.train.engine import hard_exit

if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--deepspeed-config", type=Path, required=True)
    parser.add_argument("--attention", required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=output_file, required=True)
    for name in ("micro-batch", "activation-checkpointing", "sequence-length", "accumulation", "steps"):
        parser.add_argument(f"--{name}", type=COUNT, required=True)
    parser.add_argument("--local_rank", type=COUNT, help="appended by the launcher; the environment is what counts")
    options = parser.parse_args()
    setting = Setting(
        options.deepspeed_config,
        options.micro_batch,
        options.attention,
        options.compile,
        options.activation_checkpointing,
    )
    run = (options.model, options.sequence_length, options.accumulation, options.steps, options.output)
    hard_exit(main(setting, *run))
