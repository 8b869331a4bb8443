"""``python -m rnn_longctx.train CONFIG [--set a.b=value ...]``"""

from __future__ import annotations

import argparse
import sys

from rnn_longctx.config import load_yaml
from rnn_longctx.errors import InputError
from rnn_longctx.train import TrainConfig, TrainingDiverged, train


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rnn_longctx.train", description="Train a model; resumes.")
    parser.add_argument("config", help="a YAML file, such as configs/train/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    arguments = parser.parse_args()
    try:
        print(train(load_yaml(TrainConfig, arguments.config, arguments.set)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
