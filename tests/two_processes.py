"""One of the processes of `test_trainer.test_two_processes_equal_one_with_the_same_global_batch`."""

import sys
from pathlib import Path

from test_trainer import options, stage

if __name__ == "__main__":
    stage(options(Path(sys.argv[1]), max_steps=4), batches=8).run()
