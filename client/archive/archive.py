"""What an import needs of an archive, whichever protocol it speaks, and how an archive fails."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

from fedcmr.client.ingest.reasons import REASONS
from fedcmr.shared.errors import UserError

Level = Literal["STUDY", "SERIES", "IMAGE"]


class Archive(Protocol):
    """DICOMweb or DIMSE: two questions, asked by one thread."""

    def find(self, level: Level, match: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """What the archive has (QIDO-RS, PS3.18, 10.6; C-FIND in the Study Root, PS3.4, C.6.2).

        Args:
            level: What to list.
            match: Values to look for, by keyword of the data element; an empty value is asked for. Below the level of
                studies the UIDs of those above are among them.

        Yields:
            The values by keyword, as texts; one that the archive does not give is absent or empty.

        Raises:
            Broken: There is no connection, or it broke.
            Answered: The archive answers with an error.
            UserError: Somebody has to correct something first.
        """
        ...

    def fetch(
        self, study_uid: str, series_uid: str, wanted: Collection[str], folder: Path, uncompressed: bool = False
    ) -> None:
        """Write the images of a series into a folder, each as a DICOM file of a name that says nothing.

        They come in the transfer syntax in which the archive keeps them where it may and can be read here. There may be
        fewer files than are wanted, or others.

        Args:
            study_uid: Of the study.
            series_uid: Of the series.
            wanted: SOPInstanceUIDs of the images that are needed.
            folder: An empty one.
            uncompressed: Have the archive decode them, to Explicit VR Little Endian.

        Raises:
            As `find`.
        """
        ...

    def where(self, study_uid: str, series_uid: str = "") -> str:
        """How somebody finds a study, or one of its series, in the archive; for the site's own eyes."""
        ...

    def close(self) -> None:
        """End what is open."""
        ...


class Broken(Exception):  # noqa: N818
    """There is no connection, or it broke, which may pass; says how, on one line."""


class Answered(Exception):  # noqa: N818
    """The archive answers with an error.

    Attributes:
        code: Of `REASONS`: what becomes of the study that it was asked about.
        passing: Whether the same question may be answered later.
    """

    def __init__(self, code: str, text: str, passing: bool = False) -> None:
        assert code in REASONS, code
        super().__init__(text)
        self.code, self.passing = code, passing


class NotFetched(Exception):  # noqa: N818
    """A study that the archive did not hand over; holds a code of `REASONS` and nothing of the patient."""

    def __init__(self, code: str) -> None:
        assert code in REASONS, code
        super().__init__(code)
        self.code = code


class NotReached(UserError):  # noqa: N818
    """No connection came about for as long as somebody was willing to wait."""
