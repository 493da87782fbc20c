"""Estimate the class mix of a folder of unlabeled images, and predict the class of each.

python predict_folder.py -r saved/NAME/RUN/last.pth --images FOLDER [-c configs/test_time_*.json]
"""

from commands.command_line import run_script
from commands.jobs import run_predict_folder as main

if __name__ == "__main__":
    run_script(main, __doc__)
