"""Training from a config: ``train(load_yaml(TrainConfig, "configs/train/demo.yaml"))``."""

from rnn_longctx.train.config import TrainConfig, spelled_out
from rnn_longctx.train.loop import TrainingDiverged, train
from rnn_longctx.train.online import train_online

__all__ = ["TrainConfig", "TrainingDiverged", "spelled_out", "train", "train_online"]
