"""``python -m pliant`` is the command line."""

import sys

from pliant.cli import main

sys.exit(main())
