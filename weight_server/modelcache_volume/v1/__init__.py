"""Stubs generated from manifest.proto by `make proto`."""
