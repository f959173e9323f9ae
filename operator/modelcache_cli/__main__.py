"""`python -m modelcache_cli` is `modelcache`."""

import sys

from modelcache_cli.main import main

sys.exit(main())
