"""`rnn-longctx train` for launchers that start a module: `accelerate launch -m rnn_longctx.train CONFIG`, or
`torchrun --nproc-per-node 8 -m rnn_longctx.train CONFIG`."""

import sys

from rnn_longctx.cli import main

sys.argv[1:1] = ["train"]
main()
