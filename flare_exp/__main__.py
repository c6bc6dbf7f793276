"""Run the command line: `python -m flare_exp key=value ...`."""

import signal
import sys

from flare_exp.cli.main import main


def run() -> int:
    """Run this process's command line and return its exit code.

    From then on Ctrl-C ends the process without a message: everything is kept, and an interrupted
    exit would print a traceback. Where SIGINT is ignored, it stays ignored.
    """
    try:
        return main()
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(run())
