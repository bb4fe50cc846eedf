"""Federated evaluation: a model that the server sends, judged on the site's own test patients.

What leaves is a table of sums over them, in the form that the site's policy says: `private`, one Gaussian mechanism
that is charged to the ledger of the test patients before anything is computed, or `table`, the sums as they are, with
groups of fewer than five left out. Each patient's own prediction stays in a file at the site.

The test patients have a ledger of their own. Whoever is in the training folder too, by the pseudonym of the patient, is
left out of the test, so that every patient is behind exactly one of both ledgers, and the epsilon of a patient is that
of one ledger, not the sum: parallel composition (McSherry 2009, https://doi.org/10.1145/1559845.1559850, theorem 4).
That holds as long as nobody is moved from one folder to the other between two studies: who was, has spent from both.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from client.held_out import PREDICTIONS_NAME, TestSet, read_test_set
from client.policy import SiteSettings
from shared.case import Case
from shared.checkpoint import Arrays, write_atomically
from shared.permissions import private_folder
from shared.privacy import os_generator
from shared.records import EvaluationRequest
from shared.tasks.ejection_fraction.inference import predict
from shared.tasks.ejection_fraction.network import from_arrays
from shared.tasks.ejection_fraction.stack import patient_ef
from shared.tasks.ejection_fraction.sums import PatientError, plain_table, private_table

STEP_S = 20.0
"""Private work ends a whole number of these after it began: when an answer comes tells little of how many patients
there are, and nothing where all are judged within one step."""


def judge_patients(
    cases: Mapping[str, Sequence[Case]], predict_efs: Callable[[Sequence[Case]], Sequence[float]]
) -> list[PatientError]:
    """Every patient once: one who was scanned several times with the mean over the scans, under the first's vendor.

    Patients are predicted one at a time, so that what one contributes depends on no other.

    Args:
        cases: Group -> its cases.
        predict_efs: Of one patient's cases; whatever it raises counts as a prediction that is not a number, because a
            model or a scan that makes it fail must not change what the site answers.
    """
    patients = []
    for group in sorted(cases):
        true = float(np.mean([patient_ef(case) for case in cases[group]]))
        try:
            predicted = float(np.mean(predict_efs(cases[group])))
        except Exception:
            predicted = math.nan
        patients.append(PatientError(cases[group][0].info.vendor, true, predicted))
    return patients


def sums(site: SiteSettings, request: EvaluationRequest, model: Arrays, device: torch.device, plain: bool) -> Arrays:
    """The table that leaves the site; also writes the patients' own predictions into the site's folder.

    Raises:
        UserError: The test folder cannot be used.
    """
    started = time.monotonic()
    test = read_test_set(site)
    network = from_arrays(model)
    patients = judge_patients(test.patients, lambda cases: predict(network, cases, request.num_tta, device).ef.tolist())
    _keep(site, request, test, patients)
    if plain:
        table = plain_table(patients, site.vendor_names)
    else:
        table = private_table(patients, site.vendor_names, request.noise_multiplier, os_generator())
        elapsed_s = time.monotonic() - started
        time.sleep(math.ceil(elapsed_s / STEP_S) * STEP_S - elapsed_s)
    return {vendor: row.astype(np.float32) for vendor, row in table.items()}


def _keep(site: SiteSettings, request: EvaluationRequest, test: TestSet, patients: Sequence[PatientError]) -> None:
    """Write the predictions where only the site's own people read them; a full disk costs them, and not the answer."""
    rows = [
        {"patient": group, "vendor": patient.vendor, "true": patient.true,
         "predicted": patient.predicted if math.isfinite(patient.predicted) else None}
        for group, patient in zip(sorted(test.patients), patients, strict=True)
    ]  # fmt: skip
    text = json.dumps({"left_out": test.left_out, "patients": rows}, indent=1)
    folder = site.folder / PREDICTIONS_NAME
    with contextlib.suppress(OSError):
        private_folder(folder)
        write_atomically(folder / f"{request.ledger_run}.json", text.encode())
