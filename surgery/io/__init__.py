"""Bytes in and out: strict headers, ranged reads, staged folders, hashes, Hub paths."""
