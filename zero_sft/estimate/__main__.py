"""`python -m zero_sft.estimate`."""

import sys

from zero_sft.estimate.cli import main

sys.exit(main())
