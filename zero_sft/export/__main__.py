"""Run the export command: `python -m zero_sft.export`."""

import sys

from zero_sft.commands.export import main

sys.exit(main())
