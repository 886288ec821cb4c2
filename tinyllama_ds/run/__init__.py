"""One run: resolved, its directory, identity, ledger and metrics."""
