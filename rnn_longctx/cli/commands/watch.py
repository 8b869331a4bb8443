"""`rnn-longctx watch`: a page that follows a monitor's log, or a training run, while the model works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.output import address, say


@command("watch")
def watch(
    log: Annotated[Path, typer.Argument(help="A monitor's log, FILE.jsonl, or the folder of a training run.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
) -> None:
    """Follow a log in the browser of this machine; it only reads the file. Ctrl-C ends it.

    Examples:
        rnn-longctx watch runs/monitor.jsonl
        rnn-longctx watch runs/demo-train --port 8000
    """
    from rnn_longctx.config import counted, home_path
    from rnn_longctx.eval.show.watch.server import Watch

    with Watch(home_path(log), port) as server:
        try:
            file = server.source.follow.path
            waits = "" if file.exists() else f"; {file} is not there yet"
            address(f"{server.url} (Ctrl-C ends it{waits})")
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"ended; {counted(server.source.points.count, 'row')} of {log} were read")
