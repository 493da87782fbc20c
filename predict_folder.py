"""Learn the expert weights on a folder of unlabeled images, and predict the class of each.

python predict_folder.py -c configs/test_time_custom_example.json -r saved/NAME/RUN/last.pth --images FOLDER
"""

from trainer.command_line import run_script
from trainer.jobs import run_predict_folder as main

if __name__ == "__main__":
    run_script(main, __doc__, adapting=True, predicting=True)
