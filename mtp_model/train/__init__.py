"""Training an adapter for a frozen base model, on one device or many."""

from mtp_model.train.config import TrainConfig
from mtp_model.train.parallel import World
from mtp_model.train.trainer import Trainer, TrainingFailed
from mtp_model.train.watch import LOG, Evaluation

__all__ = ["LOG", "Evaluation", "TrainConfig", "Trainer", "TrainingFailed", "World"]
