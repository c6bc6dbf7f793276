"""Run the command line: `python -m flare_exp key=value ...`."""

import sys

from flare_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
