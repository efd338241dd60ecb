"""Atomic writes, bounded readers of untrusted files, the cache."""
