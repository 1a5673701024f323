"""Run the data command: `python -m zero_sft.data`."""

import sys

from zero_sft.commands.data import main

sys.exit(main())
