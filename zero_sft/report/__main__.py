"""Run the report command: `python -m zero_sft.report`."""

import sys

from zero_sft.commands.report import main

sys.exit(main())
