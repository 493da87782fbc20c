"""Calibrate a network: three numbers from labeled images that it was not trained on, kept beside its checkpoint.

  python -m commands.calibrate -r saved/NAME/RUN/last.pth --images data/custom/labeled.txt --averaged_views 4

One image a class is enough; the list may lack classes, which are then named. Without --images the held-out validation
images of the data are taken, if there are some. The numbers are used wherever this checkpoint adapts with the same
averaged views.
"""

from commands.command_line import run_script
from commands.jobs import run_calibrate as main

if __name__ == "__main__":
    run_script(main, __doc__)
