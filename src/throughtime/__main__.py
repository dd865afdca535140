"""`python -m throughtime`: the command line."""

import sys

from throughtime.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
