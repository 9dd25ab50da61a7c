"""torchrun -m mtp_model.train: `python -m mtp_model train` by several processes."""

import sys

from mtp_model.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
