"""`python -m harness`, as torchrun calls it."""

import sys

from harness.commands.command_line import main

if __name__ == "__main__":
    sys.exit(main())
