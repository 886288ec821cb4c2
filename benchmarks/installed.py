"""Which contenders of a benchmark can run here, before any of them does."""

import sys
from collections.abc import Mapping
from importlib import import_module


def of_installed(needs: Mapping[str, str | None]) -> list[str]:
    """The names whose package imports here, or who need none; the others are said on stderr, each with the reason.

    Ends the program where none is left.
    """
    left = []
    for name, package in needs.items():
        try:
            if package is not None:
                import_module(package)
        except ImportError as error:
            print(f"{name}: skipped, {package} is not installed ({error})", file=sys.stderr, flush=True)
        else:
            left.append(name)
    if not left:
        raise SystemExit("no contender can run here")
    return left
