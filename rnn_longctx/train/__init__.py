"""Training from a config: ``train(load_yaml(TrainConfig, "configs/train/demo.yaml"))``."""

from rnn_longctx.train.config import TrainConfig
from rnn_longctx.train.online import train_online
from rnn_longctx.train.trainer import TrainingDiverged, train

__all__ = ["TrainConfig", "TrainingDiverged", "train", "train_online"]
