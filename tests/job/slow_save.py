"""The job, with checkpoints that take SLOW_SAVE seconds to write: `python -m tests.job.slow_save`."""

import os
import sys
import time

from zero_sft import train
from zero_sft.saving import checkpoint_saver

if __name__ == "__main__":
    from zero_sft.cluster.launcher_watch import leave

    write_parts = checkpoint_saver.write_parts

    def slowly(*args, **kwargs):
        time.sleep(float(os.environ["SLOW_SAVE"]))
        return write_parts(*args, **kwargs)

    checkpoint_saver.write_parts = slowly
    leave(train.main(sys.argv[1:]))
