"""Evaluate a checkpoint on the balanced test set: top-1, many / medium / few-shot classes, each expert.

python test.py -r saved/NAME/RUN/last.pth
"""

from commands.command_line import run_script
from commands.jobs import run_test as main

if __name__ == "__main__":
    run_script(main, __doc__)
