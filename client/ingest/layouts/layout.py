"""What `prepare` has to know of a layout: how its patients are found, and which options it takes."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from fedcmr.client.ingest.cine import Findings
from fedcmr.client.ingest.sandbox import Workers

SHORT_AXIS = "short-axis"
"""Axes that a header cannot tell: slices along the longest voxel side, columns and rows as a radiologist sees the heart
from its apex, up to quarter turns."""


@dataclass(frozen=True)
class Options:
    """What a user may say about the scans; a layout takes those that it names in `Layout.takes`.

    Attributes:
        folds: Numbers of the folds to keep; None keeps all.
        labels: What the masks' numbers mean, from theirs to `fedcmr.shared.case`'s; None where nothing is said.
        one_study_one_patient: Each study without a patient's number is a patient of its own.
        issuers_differ: A number of another issuer is another patient.
        axes: `SHORT_AXIS` where every stack is one, whatever its header says; None where the headers know.
    """

    folds: Collection[int] | None = None
    labels: Mapping[int, int] | None = None
    one_study_one_patient: bool = False
    issuers_differ: bool = False
    axes: str | None = None

    def given(self) -> list[str]:
        """Names of the options that say something."""
        return [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]


@dataclass(frozen=True)
class Layout:
    """A way in which scans are stored.

    Attributes:
        find: The patients of a folder, by the folder, the options, and processes that may read files in it. Reading a
            patient comes later, in a process of its own: see `Study.read`.
        expects: What the folder has to hold, for `prepare --help`; several lines where one is too short.
        takes: The options that mean something here.
        public_set: The public data set whose layout this is, a key of `fedcmr.shared.provenance.PUBLIC_SETS`; None
            where any scans may be stored so, which then count as private.
    """

    find: Callable[[Path, Options, Workers], Findings]
    expects: str
    takes: tuple[str, ...] = ()
    public_set: str | None = None
