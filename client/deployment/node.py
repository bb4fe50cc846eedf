"""`flower-supernode`, which asks for work every second.

Flower's own asks every three, and a round waits for the last of its sites to ask. Nothing else differs: where Flower
has no such pause any more, this is its command.
"""

import importlib
import time
from types import SimpleNamespace

POLL_S = 1.0


def main() -> None:
    """Run Flower's command with the arguments of this one."""
    prompt = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(min(seconds, POLL_S))})
    vars(importlib.import_module("flwr.supernode.start_client_internal"))["time"] = prompt
    importlib.import_module("flwr.supernode.cli").flower_supernode()


if __name__ == "__main__":
    main()
