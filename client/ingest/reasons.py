"""Why a study, a series or a file does not become a case."""

REASONS = {
    # studies
    "no-short-axis-cine": "no stack of parallel short-axis slices with several phases each",
    "ambiguous-stack": "two series hold the same slices: export one of them",
    "ambiguous-phase-order": "neither TriggerTime nor InstanceNumber tells the phases apart",
    "uneven-phases": "slices with different numbers of phases: a file is missing or belongs elsewhere",
    "uneven-spacing": "slices at uneven distances: one is missing or belongs elsewhere",
    "slices-not-aligned": "slices are shifted against each other",
    "unreadable-pixels": "an image's pixels are cut, or stored in a way that cannot be decoded here",
    "constant-image": "the images, or those of end-diastole or end-systole alone, hold no contrast",
    "missing-file": "a frame, a mask or the whole folder of a listed patient is missing",
    "unreadable-nifti": "a NIfTI file is damaged",
    "masks-differ": "image and mask have different shapes or numbers of phases",
    "masks-misaligned": "the masks lie outside the images: their affine does not agree with the scans",
    "masks-implausible": "labels other than expected, fewer than two phases with a left ventricle, or equal ones",
    "heart-beyond-crop": "the left ventricle reaches beyond a case's 144 mm: the pixel spacing may be wrong",
    "ambiguous-masks": "one mask file for several studies: keep each beside its own scans",
    "unexpected-error": "the reader failed: please report the kind of scanner and export",
    # files, and series of a usable study
    "not-dicom": "files that are not DICOM",
    "damaged-header": "files that begin like DICOM and cannot be parsed",
    "unreadable": "files or folders that this account may not read",
    "no-regular-file": "links, devices and other things that are not plain files",
    "deflated": "files in a compressed transfer syntax that is refused unopened",
    "enhanced-multiframe": "Enhanced multi-frame files: export as classic MR images",
    "not-mr-image": "other objects: reports, masks, secondary captures, other modalities",
    "no-geometry": "images without a usable position, orientation or pixel spacing",
    "no-uid": "images that do not say which study, series or instance they are",
    "duplicate": "copies of an image that is already there",
    "not-cine": "series or slices with too few phases: localisers, late enhancement, perfusion",
    "other-orientation": "series of another orientation, or with too few slices: long axis, axial, outflow tract",
}
"""Every code with what it means, in words for the person who exports scans."""


class Unusable(Exception):  # noqa: N818
    """A study, series or file that cannot become a case; holds a code of `REASONS` and nothing of the patient."""

    def __init__(self, code: str) -> None:
        assert code in REASONS, code
        super().__init__(code)
        self.code = code
