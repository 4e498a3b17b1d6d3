"""`python -m serverlesslora_loadgen` is the `serverlesslora-loadgen` command."""

from __future__ import annotations

import sys

from serverlesslora_loadgen.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
