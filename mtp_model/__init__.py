"""A Llama-family model that writes several tokens per step, and exactly its own text."""

from mtp_model.checkpoint import Adapter, from_transformers, load_adapter, load_model, save_adapter
from mtp_model.config import ModelConfig, MTPConfig
from mtp_model.decode import DecodeResult, DecodeStats, Decoding, generate
from mtp_model.model import MTPModel
from mtp_model.train import TrainConfig, Trainer

__all__ = [
    "Adapter",
    "DecodeResult",
    "DecodeStats",
    "Decoding",
    "MTPConfig",
    "MTPModel",
    "ModelConfig",
    "TrainConfig",
    "Trainer",
    "from_transformers",
    "generate",
    "load_adapter",
    "load_model",
    "save_adapter",
]
