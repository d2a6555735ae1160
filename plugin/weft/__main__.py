"""`python -m weft` is the `weft` command."""

import sys

from weft.main import main

sys.exit(main())
