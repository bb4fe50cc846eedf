"""Federated evaluation: a model that the server sends, evaluated on the site's own test patients.

What leaves is a table of sums over them, in the form that the site's policy says: `private`, one Gaussian mechanism
that is charged to the ledger of the test patients before anything is computed, or `table`, the sums as they are, with
groups of fewer than five left out. Each patient's own prediction stays in a file at the site.

The test patients have a ledger of their own. Whoever is in the training folder too, by the pseudonym of the patient, is
left out of the test, so that every patient is behind exactly one of both ledgers, and the epsilon of a patient is that
of one ledger, not the sum: parallel composition (McSherry 2009, https://doi.org/10.1145/1559845.1559850, theorem 4).
That holds as long as nobody is moved from one folder to the other between two studies: who was, has spent from both.

How long it may take is known before a patient is looked at: `expected_seconds` times the request on invented patients,
as many as the site's public number. A private answer leaves no earlier than that.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fedcmr.client.evaluation_patients import PREDICTIONS_NAME, TestSet, read_test_set
from fedcmr.client.policy import SiteSettings
from fedcmr.shared.case import CASE_PIXEL_MM, CASE_SIZE, Case, CaseInfo
from fedcmr.shared.checkpoint import Arrays, write_atomically
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.privacy import os_generator
from fedcmr.shared.records import EvaluationRequest
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import Regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef
from fedcmr.shared.tasks.ejection_fraction.sums import PatientError, plain_table, private_table

STEP_S = 20.0
"""Private work ends a whole number of these after it began."""
INVENTED_SLICES = 16
"""Slices of an invented patient: a stack as tall as short-axis stacks come; most have 8 to 12."""
SPARE = 2.0
"""Expected time over that of the invented patients' predictions: for reading cases, and for what else the machine does.
With the height of the invented stacks it makes an answer rare whose time depends on the patients."""


def evaluate_patients(
    cases: Mapping[str, Sequence[Case]],
    predict_efs: Callable[[Sequence[Case]], Sequence[float]],
    deadline: float = math.inf,
) -> list[PatientError]:
    """Every patient once: one who was scanned several times with the mean over the scans, under the first's vendor.

    Patients are predicted one at a time, so that what one contributes depends on no other.

    Args:
        cases: Group -> its cases.
        predict_efs: Predicts the EFs of one patient's cases; whatever it raises counts as a prediction that is not a
            number, because a model or a scan that makes it fail must not change what the site answers.
        deadline: In seconds of `time.monotonic`, checked after each patient.

    Raises:
        TimeoutError: It has passed. Not the patient's failure but the work's: the next ones would take no less.
    """
    patients = []
    for group in sorted(cases):
        true = float(np.mean([patient_ef(case) for case in cases[group]]))
        try:
            predicted = float(np.mean(predict_efs(cases[group])))
        except Exception:
            predicted = math.nan
        patients.append(PatientError(cases[group][0].info.vendor, true, predicted))
        if time.monotonic() > deadline:
            raise TimeoutError("Expected the test patients to be evaluated within policy.max_seconds.")
    return patients


def invented_test_set(site: SiteSettings) -> TestSet:
    """As many test patients as the site's public number, all of them nobody: one empty stack, under its first vendor.

    `site.yaml` says in public how many patients the site has to train on, and not how many to test; most sites have
    fewer of these.
    """
    stack = np.zeros((2, INVENTED_SLICES, CASE_SIZE, CASE_SIZE), np.float32)
    spacing_mm = np.array([8.0, CASE_PIXEL_MM, CASE_PIXEL_MM], np.float32)
    info = CaseInfo("nobody", site.vendor_names[0], math.nan, 0.5, "")
    nobody = Case(info, stack, stack.astype(np.uint8), spacing_mm)
    return TestSet({f"nobody-{number}": [nobody] for number in range(site.nominal_patients)}, {})


def expected_seconds(site: SiteSettings, network: Regressor, num_tta: int, device: torch.device) -> float:
    """How long `sums` will take here at most, from predictions for invented patients alone.

    Args:
        site: Its public number, so that neither a refusal nor the time of an answer reveals the real one.
        network: The server's own: weights may decide how fast a machine multiplies.
        num_tta: Rotations averaged in every prediction.
        device: Where it runs.
    """
    patients = invented_test_set(site).patients
    first = dict([next(iter(patients.items()))])
    elapsed_s = 0.0
    for _ in range(2):  # the first time warms up
        started = time.perf_counter()
        evaluate_patients(first, _predictor(network, num_tta, device))
        elapsed_s = time.perf_counter() - started
    return SPARE * len(patients) * elapsed_s


def sums(
    site: SiteSettings,
    request: EvaluationRequest,
    network: Regressor,
    device: torch.device,
    plain: bool,
    expected_s: float,
    invented: bool = False,
) -> Arrays:
    """The table that leaves the site; also writes the patients' own predictions into the site's folder.

    Private work ends a whole number of `STEP_S` after it began, and not before `expected_s`: when it ends reveals
    nothing of the patients unless they take longer than that, and then only by how many steps.

    Args:
        site: Whose test patients.
        request: What is requested about them.
        network: The model.
        device: Where it runs.
        plain: Whether the sums leave as they are.
        expected_s: From `expected_seconds`.
        invented: Whether nobody takes the patients' place and nothing is written.

    Raises:
        UserError: The test folder cannot be used.
        TimeoutError: The work took longer than the policy's `max_seconds`.
    """
    started = time.monotonic()
    test = invented_test_set(site) if invented else read_test_set(site)
    deadline = started + site.policy.max_seconds
    patients = evaluate_patients(test.patients, _predictor(network, request.num_tta, device), deadline)
    if not invented:
        _keep(site, request, test, patients)
    if plain:
        table = plain_table(patients, site.vendor_names)
    else:
        table = private_table(patients, site.vendor_names, request.noise_multiplier, os_generator())
        elapsed_s = time.monotonic() - started
        time.sleep(math.ceil(max(elapsed_s, expected_s) / STEP_S) * STEP_S - elapsed_s)
    return {vendor: row.astype(np.float32) for vendor, row in table.items()}


def _predictor(network: Regressor, num_tta: int, device: torch.device) -> Callable[[Sequence[Case]], Sequence[float]]:
    """The network's predictions for one patient's cases."""
    return lambda cases: predict(network, cases, num_tta, device).ef.tolist()


def _keep(site: SiteSettings, request: EvaluationRequest, test: TestSet, patients: Sequence[PatientError]) -> None:
    """Write the predictions where only the site's own people read them; a full disk costs them, and not the answer."""
    rows = [
        {
            "patient": group,
            "vendor": patient.vendor,
            "true": patient.true,
            "predicted": patient.predicted if math.isfinite(patient.predicted) else None,
        }
        for group, patient in zip(sorted(test.patients), patients, strict=True)
    ]
    text = json.dumps({"left_out": test.left_out, "patients": rows}, indent=1)
    folder = site.folder / PREDICTIONS_NAME
    with contextlib.suppress(OSError):
        private_folder(folder)
        write_atomically(folder / f"{request.ledger_run}.json", text.encode())
