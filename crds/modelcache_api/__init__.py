"""The ModelCache resource: its models, its reasons, its sources, and how a manifest file is read.

`resource` holds the pydantic models from which the CRD is generated; `reasons` and `source` need the standard library
only, so that a program without pydantic can name an exit code or a repo.
"""
