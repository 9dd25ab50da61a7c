"""What the processes that `test_train` kills run: a module of its own, for they should not have to import the tests."""

import torch
import torch._dynamo  # which an optimizer's first step imports, for seconds

from mtp_model import Trainer, load_model


def go_on(directory, examples, mtp, config, out):
    torch.set_num_threads(1)
    return Trainer(load_model(directory), examples, mtp, config, out, resume=True).run()
