"""Train, test and compare methods over seeds: one command for a whole table, its plots and its costs.

  python reproduce.py --quick                                          every step in minutes, on CIFAR-100
  python reproduce.py --data cifar100_ir100 --seeds 1 2 3              Softmax, RIDE, TADE with the published recipes
  python reproduce.py --data cifar100_ir100 --seeds 1 2 --epochs 20    the same, on a shortened schedule

Every run is train.py, then test_all_*.py and, for TADE, test_train_*.py, on the last and the best checkpoint. Stopped
or killed at any moment and started again with the same options, it goes on from there; what is done is not done again.
The folder --output gets every run's checkpoints, results and log; report.md, results.csv and the plots there are of the
runs asked for last.
"""

import sys

from comparison.run import main
from utils.errors import UserError

if __name__ == "__main__":
    try:
        sys.exit(main(__doc__))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.status)
