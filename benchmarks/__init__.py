"""Ours and the peers, one after the other in one run: ``python -m benchmarks NAME [--json FILE]``. See ``README.md``."""
