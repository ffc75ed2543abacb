"""The process of one peer: `python worker.py MODULE`, started by compare.py, speaks what protocol.py describes."""

from __future__ import annotations

import sys
from importlib import import_module

from protocol import Job, Peer, serve


def open_peer(job: Job) -> Peer:
    """The peer of the module that the command line names; its library is imported only now, in this process."""
    peer: Peer = import_module(f"peers.{sys.argv[1]}").open_peer(job)
    return peer


if __name__ == "__main__":
    serve(open_peer)
