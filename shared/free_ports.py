"""Ports of this machine's loopback that nobody uses."""

import socket
from contextlib import ExitStack


def free_ports(number: int) -> list[int]:
    """So many different ports that are free now; whoever takes them has to be quick."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
