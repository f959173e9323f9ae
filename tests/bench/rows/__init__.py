"""Benchmarks, one module a topic."""
