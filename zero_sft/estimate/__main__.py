"""Entry point of `python -m zero_sft.estimate`."""

import sys

from zero_sft.commands.estimate import main

sys.exit(main())
