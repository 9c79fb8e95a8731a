"""Ours and the peers in one run: ``python -m benchmarks NAME [--json FILE]``. See ``README.md``."""
