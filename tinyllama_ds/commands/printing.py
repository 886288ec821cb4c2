"""Output of the results of commands."""

import argparse
import json
import os
import sys
from contextlib import suppress

from tinyllama_ds.errors import EXIT_FINISHED


def print_result(options: argparse.Namespace, result: dict, text: str) -> int:
    """The result as JSON where `--json` was given, else the text; returns the exit code."""
    print(json.dumps(result) if options.json else text)
    return EXIT_FINISHED


def write_no_more() -> None:
    """Drop the buffered rest of stdout: Python would fail again to write it at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
