from rnn_longctx.cli import main

main()
