"""Write a checkpoint's network for production: ONNX, torch.export, safetensors, and what adapting with tade needs.

python export.py -r saved/NAME/RUN/last.pth [-o FOLDER] [--formats onnx torch safetensors]
"""

from commands.command_line import run_script
from commands.jobs import run_export as main

if __name__ == "__main__":
    run_script(main, __doc__)
