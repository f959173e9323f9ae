"""`python -m tests.bench`: see cli.py."""

import importlib
import sys
from pathlib import Path

# As under pytest: `bench` and `support` are found in this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.exit(importlib.import_module("bench.cli").main())
