"""The command `python -m harness`, for torchrun."""

import sys

from harness.commands.command_line import main

if __name__ == "__main__":
    sys.exit(main())
