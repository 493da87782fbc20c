"""Evaluate an iNaturalist 2018 checkpoint on every test class distribution, its experts weighted equally.

python test_all_inat.py -r saved/NAME/RUN/last.pth
"""

from commands.command_line import run_script
from commands.jobs import run_test_all as main

if __name__ == "__main__":
    run_script(main, __doc__)
