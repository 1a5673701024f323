"""`python -m zero_sft.data`."""

import sys

from zero_sft.data.cli import main

sys.exit(main())
