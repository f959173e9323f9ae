"""A real single-node Kubernetes on one Linux machine, for the tests: see docs/contributing/cluster.md."""
