"""`python -m calm` is the command `calm`."""

import sys

from calm.cli import main

if __name__ == "__main__":
    sys.exit(main())
