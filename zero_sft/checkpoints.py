"""List a run's checkpoints: `python -m zero_sft.checkpoints RUN`. `commands/checkpoints.py` is the command."""

import sys

from zero_sft.commands.checkpoints import main

if __name__ == "__main__":
    sys.exit(main())
