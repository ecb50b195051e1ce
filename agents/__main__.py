"""``python -m agents`` is the command ``dpok``."""

import sys

from agents.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
