"""How long this machine takes for a request, measured before anything is charged, and on invented patients alone.

Every message is answered by a new process, which would measure anew what the last one has found: it is kept in
`pace.json` in the site's folder, for a day. Nobody else reads that file, and nothing in it is of a patient.
"""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from fedcmr.client.training import AnyPatient, Execution, Learner, LocalSteps
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import one_core_each
from fedcmr.shared.privacy import Mechanism

PACE_NAME = "pace.json"
KEPT_S = 86_400.0
"""How long a measurement counts: a machine that others have kept busy, or that was replaced, is measured again."""
TIMED_VIEWS = 4
"""Views of the dummy patient whose gradient is timed; time grows with the views, and less than in proportion."""


def estimated_seconds(
    folder: Path,
    learner: Learner[AnyPatient],
    part: Mapping[str, torch.nn.Parameter],
    mechanism: Mechanism,
    steps: LocalSteps,
    execution: Execution,
) -> float:
    """How long `fedcmr.client.training.private_steps` will take here, from work on dummy patients.

    An estimate above `execution.max_seconds`, for which a request would be refused, is never an old one: the machine
    may have been busy when it was measured.

    Args:
        folder: The site's, with what was measured before; one that cannot be written costs a measurement every time.
        learner: What would be trained; left as it was.
        part: Its trainable part.
        mechanism: How many steps, on the site's public number of patients, so that the answer to a request does not
            tell the real one.
        steps: With how many views.
        execution: Where it will run, and for how long.
    """
    device = execution.device
    num_views = min(steps.num_views, TIMED_VIEWS)
    at_once = torch.get_num_threads() if device.type == "cpu" else 1
    waves = math.ceil(mechanism.divisor / at_once)
    kind = f"{learner.name}, {num_views} views, {at_once} at once, {device}"

    def of_request(wave_s: float) -> float:
        return mechanism.num_steps * waves * wave_s * steps.num_views / num_views

    measured = _measured(folder)
    if kind in measured and of_request(measured[kind][0]) <= execution.max_seconds:
        return of_request(measured[kind][0])
    wave_s = _wave_seconds(learner, part, num_views, at_once, device)
    with contextlib.suppress(OSError):
        content = json.dumps(measured | {kind: (wave_s, time.time())}, indent=1)
        write_atomically(folder / PACE_NAME, content.encode())
    return of_request(wave_s)


def _wave_seconds(
    learner: Learner[AnyPatient],
    part: Mapping[str, torch.nn.Parameter],
    num_views: int,
    at_once: int,
    device: torch.device,
) -> float:
    """Seconds for the gradients of so many dummy patients at once; the second time, for the first one warms up."""
    learner.network.to(device)
    values = {name: parameter.detach().clone() for name, parameter in part.items()}
    elapsed_s = 0.0
    with learner.holding(values) as parameters:
        chosen = list(parameters.values())
        for _ in range(2):
            started = time.perf_counter()
            list(
                one_core_each(
                    lambda patient: learner.gradient(patient, num_views, 0, chosen),
                    [learner.nobody] * at_once,
                )
            )
            elapsed_s = time.perf_counter() - started
    return elapsed_s


def _measured(folder: Path) -> dict[str, tuple[float, float]]:
    """{kind of work: seconds, and when}, of the last day. A file that makes no sense holds nothing."""
    now = time.time()
    try:
        entries = json.loads((folder / PACE_NAME).read_bytes())
        found = {str(kind): (float(seconds), float(when)) for kind, (seconds, when) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        kind: (seconds, when)
        for kind, (seconds, when) in found.items()
        if 0 <= now - when <= KEPT_S and 0 < seconds < math.inf
    }
