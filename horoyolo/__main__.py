"""``python -m horoyolo`` is the console command."""

import sys

from horoyolo.cli import main

if __name__ == "__main__":
    sys.exit(main())
