"""One study of an archive, whole, in a folder of files as the archive keeps them."""

import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedcmr.client.archive.archive import Answered, Archive, NotFetched
from fedcmr.client.archive.finding import MR, ask, is_uid, mr_series
from fedcmr.client.archive.patience import Patience
from fedcmr.client.ingest.dicom.elements import wanted as wanted_elements
from fedcmr.client.ingest.dicom.parser import parse
from fedcmr.client.ingest.dicom.pixels import DECODERS, NATIVE
from fedcmr.client.ingest.dicom.reader import ENHANCED_MR, LEGACY_ENHANCED_MR, MR_IMAGE
from fedcmr.client.ingest.dicom.segmentation import SEGMENTATION_CLASSES
from fedcmr.client.ingest.places import Tally
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.permissions import private_folder

MODALITIES = (MR, "SEG")
SOP_CLASSES = (MR_IMAGE, ENHANCED_MR, LEGACY_ENHANCED_MR, *sorted(SEGMENTATION_CLASSES))
"""What `prepare` reads; everything else stays in the archive."""
READABLE = NATIVE | frozenset(DECODERS)
"""Transfer syntaxes whose pixels can be read here."""
FILES_PER_BATCH = 64


@dataclass(frozen=True)
class Fetched:
    """A study on the disk.

    Attributes:
        series: UID of each series, by the folder that holds it.
        left_out: Images that were left in the archive, each by the folder of its series.
    """

    series: dict[Path, str] = field(default_factory=dict, repr=False)
    left_out: Tally = field(default_factory=Tally, repr=False)


def fetch_study(archive: Archive, study_uid: str, folder: Path, workers: Workers, patience: Patience) -> Fetched:
    """Fetch all that `prepare` reads of a study: MR images and segmentations, every one that the archive names.

    Args:
        archive: Where from.
        study_uid: Of the study.
        folder: To make, or to make anew.
        workers: Child processes that look at the files.
        patience: With the archive.

    Raises:
        NotFetched: The archive does not hand it over.
        UserError: It is not reached, or somebody has to correct something.
    """
    shutil.rmtree(folder, ignore_errors=True)
    fetched = Fetched()
    rows = list(mr_series(archive, patience, study_uid, MODALITIES))
    if not rows:
        raise NotFetched("study-vanished")
    for number, row in enumerate(rows):
        series_uid, target = row["SeriesInstanceUID"], folder / f"{number:04d}"
        fetched.series[target] = series_uid
        keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid}
        images = ask(archive, patience, "IMAGE", {**keys, "SOPInstanceUID": "", "SOPClassUID": ""})
        read = [one for one in images if one.get("SOPClassUID", "") in ("", *SOP_CLASSES)]
        for index in range(len(images) - len(read)):
            fetched.left_out.add("not-mr-image", target / f"in the archive {index}")
        uids = {one["SOPInstanceUID"] for one in read if is_uid(one.get("SOPInstanceUID", ""))}
        if uids:
            _fetch_series(archive, patience, study_uid, series_uid, uids, target, workers)
    return fetched


def _fetch_series(
    archive: Archive,
    patience: Patience,
    study_uid: str,
    series_uid: str,
    wanted: set[str],
    folder: Path,
    workers: Workers,
) -> None:
    """Fetch a series until it is whole, and have the archive decode what cannot be decoded here."""
    decoded = folder.with_name(folder.name + "-decoded")

    def once() -> None:
        _empty(folder)
        archive.fetch(study_uid, series_uid, wanted, folder)
        arrived = _arrived(folder, wanted, workers)
        lacking = wanted - {uid for uid, (_, syntax) in arrived.items() if syntax in READABLE}
        if not lacking:
            return
        _empty(decoded)
        with suppress(Answered):  # it cannot: as they are `prepare` counts them as "no-decoder"
            archive.fetch(study_uid, series_uid, lacking, decoded, uncompressed=True)
        for uid, (path, syntax) in _arrived(decoded, lacking, workers).items():
            if syntax in READABLE or uid not in arrived:
                path.replace(arrived[uid][0] if uid in arrived else folder / f"decoded-{path.name}")
                lacking.discard(uid)
        shutil.rmtree(decoded)
        if not lacking <= arrived.keys():
            raise Answered("incomplete-fetch", "fewer images than the archive names", passing=True)

    patience.ask(once)


def _empty(folder: Path) -> None:
    """A folder without anything of an earlier attempt."""
    shutil.rmtree(folder, ignore_errors=True)
    private_folder(folder)


def _arrived(folder: Path, wanted: set[str], workers: Workers) -> dict[str, tuple[Path, str]]:
    """File and transfer syntax of every image that is wanted, by SOPInstanceUID; other files are removed."""
    files = sorted(folder.iterdir())
    arrived: dict[str, tuple[Path, str]] = {}
    for path, found in zip(files, workers.map(name_of, files, batch_size=FILES_PER_BATCH), strict=True):
        if isinstance(found, Unusable) or found[0] not in wanted or found[0] in arrived:
            path.unlink()
        else:
            arrived[found[0]] = path, found[1]
    return arrived


def name_of(path: Path) -> tuple[str, str]:
    """SOPInstanceUID and transfer syntax of a file; runs in a child process.

    Raises:
        Unusable: It is no DICOM file.
    """
    parsed = parse(path, wanted_elements("SOPInstanceUID"))
    return parsed.elements.text("SOPInstanceUID"), parsed.transfer_syntax
