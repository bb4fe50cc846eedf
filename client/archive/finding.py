"""Which studies of an archive fit a query. Nothing is asked for that names a patient."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fedcmr.client.archive.archive import Archive, Level, NotFetched
from fedcmr.client.archive.patience import Patience
from fedcmr.client.archive.query import MAX_UID_LENGTH, Query
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.vendor import agreed_vendor
from fedcmr.shared.case import UNKNOWN
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import track

MR = "MR"


@dataclass(frozen=True)
class FoundStudy:
    """A study with MR images.

    Attributes:
        uid: StudyInstanceUID.
        year: Of StudyDate; empty where the archive does not say.
        vendor: One of `fedcmr.shared.case.VENDORS` or "unknown", by what the archive says.
        num_images: In its MR series; 0 where the archive does not count them.
        accession: AccessionNumber; empty where the archive does not say.
    """

    uid: str = field(repr=False)
    year: str
    vendor: str
    num_images: int
    accession: str = field(default="", repr=False)


@dataclass(frozen=True)
class Found:
    """What an archive has for a query.

    Attributes:
        studies: In the order in which the archive names them.
        skipped: Studies that were asked for and cannot be fetched, by reason code.
    """

    studies: list[FoundStudy]
    skipped: Tally


def find_studies(archive: Archive, query: Query, patience: Patience) -> Found:
    """Ask an archive for the studies of a query.

    Raises:
        UserError: It is not reached, or somebody has to correct something.
    """
    studies: list[FoundStudy] = []
    skipped = Tally()
    seen: set[str] = set()
    for match in track(list(query.matches()), "asking the archive"):
        keys = dict.fromkeys(("StudyInstanceUID", "StudyDate", "StudyDescription", "AccessionNumber"), "")
        keys |= {"ModalitiesInStudy": MR, **match}
        try:
            rows = ask(archive, patience, "STUDY", keys)
        except NotFetched as error:
            if query.listed is None:
                raise UserError(
                    f"{patience.address} answers a search for the studies of a month with an error, three times in a "
                    "row: see its own log; or try a shorter --query date="
                ) from None
            skipped.add(error.code, _listed(match))
            continue
        exists = False
        for row in rows:
            uid = row.get("StudyInstanceUID", "")
            if not is_uid(uid):
                continue
            exists = exists or uid in seen
            if uid in seen or not query.takes(row):
                continue
            place = Place(archive.where(uid), accession=row.get("AccessionNumber", ""), study=uid)
            try:
                found = _look(archive, patience, place, row.get("StudyDate", "")[:4])
            except NotFetched as error:
                exists = True
                skipped.add(error.code, place)
                continue
            if found is None:
                continue
            exists = True
            seen.add(uid)
            if query.vendors and found.vendor == UNKNOWN:
                skipped.add("vendor-not-said", place)
            elif not query.vendors or found.vendor in query.vendors:
                studies.append(found)
        if query.listed is not None and not exists:
            skipped.add("not-in-archive", _listed(match))
    return Found(studies, skipped)


def _listed(match: Mapping[str, str]) -> Place:
    """What a line of the list says about a study that nobody has seen."""
    return Place(accession=match.get("AccessionNumber", ""), study=match.get("StudyInstanceUID", ""))


def is_uid(text: str) -> bool:
    """Whether a text can be a UID, and so may stand in an address (PS3.5, 9.1; some have leading zeros)."""
    return 0 < len(text) <= MAX_UID_LENGTH and all(part.isascii() and part.isdecimal() for part in text.split("."))


def ask(archive: Archive, patience: Patience, level: Level, match: Mapping[str, str]) -> list[dict[str, str]]:
    """All rows of an answer."""
    return patience.ask(lambda: list(archive.find(level, match)))


def mr_series(
    archive: Archive, patience: Patience, study_uid: str, modalities: tuple[str, ...]
) -> Iterator[dict[str, str]]:
    """The series of a study that are of some modalities."""
    keys = {
        "StudyInstanceUID": study_uid,
        "SeriesInstanceUID": "",
        "Modality": "",
        "Manufacturer": "",
        "NumberOfSeriesRelatedInstances": "",
    }
    for row in ask(archive, patience, "SERIES", keys):
        if row.get("Modality") in modalities and is_uid(row.get("SeriesInstanceUID", "")):
            yield row


def _look(archive: Archive, patience: Patience, place: Place, year: str) -> FoundStudy | None:
    """What the archive says about a study; None for one without MR images."""
    uid = place.study
    series = list(mr_series(archive, patience, uid, (MR,)))
    if not series:
        return None
    manufacturers = [row.get("Manufacturer", "") for row in series]
    if not any(manufacturers):  # an optional key of series (PS3.4, C.6.2.1.4), which some archives know of images alone
        keys = {"StudyInstanceUID": uid, "SeriesInstanceUID": series[0]["SeriesInstanceUID"]}
        images = ask(archive, patience, "IMAGE", {**keys, "SOPInstanceUID": "", "Manufacturer": ""})
        manufacturers = [row.get("Manufacturer", "") for row in images]
    counts = [row.get("NumberOfSeriesRelatedInstances", "") for row in series]
    num_images = sum(int(one) for one in counts if one.isdecimal())
    return FoundStudy(uid, year, agreed_vendor(manufacturers), num_images, place.accession)
