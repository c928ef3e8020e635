"""``python -m ambient_sci``: the command line."""

from __future__ import annotations

import sys

from ambient_sci.cli import main

sys.exit(main())
