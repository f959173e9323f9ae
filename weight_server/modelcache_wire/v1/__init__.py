"""Stubs generated from weights.proto by `make proto`."""
