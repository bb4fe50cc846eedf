"""Which of a site's prepared test patients a model is evaluated on: those in no training folder and with an EF."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedcmr.client.ledger import dataset_of
from fedcmr.client.policy import SiteSettings
from fedcmr.client.trainable import group_of, repeated_names
from fedcmr.shared.case import Case, load_case, read_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef

PREDICTIONS_NAME = "evaluation"
"""Folder of the predictions per patient, in the site's own."""


@dataclass(frozen=True)
class TestSet:
    """The test patients that count, and why other cases do not.

    Attributes:
        patients: Group -> its cases.
        left_out: Number of cases by reason: `in-training` of a patient who is in the training folder, `no-ef` without
            ejection fraction and masks, `vendor-not-declared`, `case-unreadable`, `named-twice`.
    """

    patients: Mapping[str, Sequence[Case]]
    left_out: Mapping[str, int]


def check_test_folder(site: SiteSettings) -> str:
    """The data set of the site's test patients, as their ledger knows it.

    Raises:
        UserError: The site has no test folder, it is no folder of cases, or its pseudonyms are of another key than
            those of the training folder, so that nobody can tell who is in both.
    """
    folder = site.test_path
    if folder is None:
        raise UserError(f"{site.folder}: site.yaml names no 'test' folder")
    read_index(folder)
    dataset = dataset_of(folder)
    if dataset != dataset_of(site.data_path):
        raise UserError(
            f"{folder} has pseudonyms of another key than {site.data_path}, so nobody can tell which patients are in "
            "both: prepare it again with the same --key"
        )
    return test_dataset(dataset)


def test_dataset(dataset: str) -> str:
    """The test patients' data set by that of the training patients: another one, so that no ledger serves for both."""
    return hashlib.sha256(f"fedcmr test patients {dataset}".encode()).hexdigest()


def read_test_set(site: SiteSettings) -> TestSet:
    """The site's test patients.

    A case that cannot be used is left out, whatever is wrong with it, so that no single patient decides whether the
    site answers.

    Raises:
        UserError: As `check_test_folder` says.
    """
    check_test_folder(site)
    folder = site.folder / str(site.test)
    trained = {group_of(info) for info in read_index(site.data_path)}
    infos = read_index(folder)
    repeated = repeated_names(infos)
    patients: dict[str, list[Case]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for info in infos:
        if group_of(info) in trained:
            left_out["in-training"] += 1
        elif info.pseudonym in repeated:
            left_out["named-twice"] += 1
        elif info.vendor not in site.vendors:
            left_out["vendor-not-declared"] += 1
        else:
            try:
                case = load_case(folder, info)
            except UserError:
                left_out["case-unreadable"] += 1
                continue
            if math.isfinite(patient_ef(case)):
                patients[group_of(info)].append(case)
            else:
                left_out["no-ef"] += 1
    return TestSet(dict(patients), dict(sorted(left_out.items())))
