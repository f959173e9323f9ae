"""`python -m tests.bench`: see cli.py."""

import importlib
import signal
import sys
from pathlib import Path

# As under pytest: `bench` and `support` are found in this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# As by Ctrl-C, the way out leaves no folder, process or cgroup behind.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
sys.exit(importlib.import_module("bench.cli").main())
