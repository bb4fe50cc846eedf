"""A site's process is killed at every single line of charge, training and commit, and the message is sent again.

Killed before the charge, it is answered as if nothing had happened; after it, with the sticky failure or the committed
reply, and the work is not done a second time.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import os, shutil, signal, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedcmr.client import app, training, hash_chained_log, ledger, release
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import load_site
from fedcmr.client.release import Refused
from fedcmr.shared import checkpoint
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.privacy import epsilon
from fedcmr.shared.records import Request, pack_request

site, prior = load_site(Path(sys.argv[1])), load_prior(Path(sys.argv[2]))
arrays = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}
request = Request(task="gradients", run_id="0123456789abcdef", server_round=2, prior_sha256=prior.sha256,
                  adapter="norm_affine", private=True, noise_multiplier=2.0, sample_rate=1.0, max_grad_norm=1.0,
                  target_delta=1e-3,                   local_steps=2, learning_rate=0.1, num_views=2, seed=0)
content = pack_request(arrays, request)
earlier = [request.mechanism.release] * int(sys.argv[3])
before = epsilon(earlier, 1e-3)[0]
after = epsilon([*earlier, request.mechanism.release], 1e-3)[0]
site = replace(site, policy=replace(site.policy, max_epsilon=1.001 * after))  # room for this one and no other
traced = {module.__file__ for module in (app, hash_chained_log, ledger, release, checkpoint)}
os.fsync = lambda descriptor: None  # what is written survives the death of a process, if not of the machine


def use(ledger_name, content=content):
    folder = site.folder / ledger_name

    def train(*_):
        Path(f"{folder}.trained").touch()
        noise = np.random.default_rng().normal()
        return {name: np.full_like(array, noise) for name, array in arrays.items()}

    training.fine_tune = train
    try:
        update, _ = app.respond(replace(site, ledger=ledger_name), content, torch.device("cpu"))
    except Refused as refused:
        return str(refused).encode()
    return np.concatenate([update[name].ravel() for name in sorted(update)]).tobytes()


use("warm_up")
if earlier:
    use("used", pack_request(arrays, replace(request, run_id="fedcba9876543210")))
number, outcomes = 0, set()
while True:
    number += 1
    name = f"ledger{number}"
    if earlier:
        shutil.copytree(site.folder / "used", site.folder / name)
        shutil.copy(site.folder / "used.replica", site.folder / f"{name}.replica")
    child = os.fork()
    if child == 0:
        left = number

        def trace(frame, event, _):
            global left
            if frame.f_code.co_filename not in traced:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        sent = use(name)
        sys.settrace(None)
        Path(f"{site.folder / name}.sent").write_bytes(sent)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    folder = site.folder / name
    spent = Ledger(folder).spent(1e-3)
    trained = Path(f"{folder}.trained").exists()
    assert min(abs(spent - before), abs(spent - after)) < 1e-9, (number, spent)
    charged = spent > before + 1e-9
    assert charged or not trained, (number, "trained without a charge")
    Path(f"{folder}.trained").unlink(missing_ok=True)
    first, second = use(name), use(name)
    assert first == second, (number, "a repeated message drew new noise")
    assert Path(f"{folder}.trained").exists() != charged, (number, "trained twice, or not at all")
    assert (first == b"internal-error") <= charged, (number, "a failure that was not charged")
    outcomes.add(first == b"internal-error")
    released = Ledger(folder).releases()
    assert released == [*earlier, request.mechanism.release], (number, "the message did not cost one release")
    assert Ledger(folder).spent(1e-3) <= site.policy.max_epsilon, number
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0 and Path(f"{folder}.sent").read_bytes() == first
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
assert outcomes == {True, False}
print(number - 1)
"""


@pytest.mark.parametrize("num_earlier", [0, 1])
def test_killed_at_any_line_no_charge_is_lost_or_double_and_nothing_is_trained_twice_or_without_one(
    make_study, tiny_prior, num_earlier
):
    site = make_study().path / "sites" / "a"
    command = [sys.executable, "-c", DRIVER, str(site), str(tiny_prior), str(num_earlier)]
    done = subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 200, "hardly any line was reached"
