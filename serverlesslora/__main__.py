"""`python -m serverlesslora` is the `serverlesslora` command."""

import sys

from serverlesslora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
