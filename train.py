"""Train a network.

python train.py -c configs/config_cifar100_ir100_tade.json      start
python train.py -r saved/NAME/RUN/last.pth                      go on
torchrun --nproc_per_node 4 train.py -c ...                     several processes
"""

from commands.command_line import run_script
from trainer import train as main

if __name__ == "__main__":
    run_script(main, __doc__)
