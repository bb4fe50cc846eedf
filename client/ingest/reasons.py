"""Why a study, a series or a file does not become a case."""

REASONS = {
    # studies
    "no-short-axis-cine": "no stack of parallel short-axis slices with several phases each: export the short-axis cine",
    "ambiguous-stack": "two series hold the same slices: export one of them",
    "mixed-geometry": "a part of the stack was scanned with another matrix or orientation: scan or export it as one",
    "ambiguous-phase-order": "neither TriggerTime nor InstanceNumber tells the phases apart",
    "phases-out-of-order": "images that should follow each other do not look alike: wrong times, or no cine",
    "uneven-phases": "slices with different numbers of phases: a file is missing or belongs elsewhere",
    "uneven-spacing": "slices at uneven distances: one is missing or belongs elsewhere",
    "slices-not-aligned": "slices are shifted against each other: export a series from one position of the patient",
    "unreadable-pixels": "an image's pixels are cut, or stored in a way that cannot be decoded here",
    "constant-image": "the images, or those of end-diastole or end-systole alone, hold no contrast",
    "missing-file": "a frame, a mask or the whole folder of a listed patient is missing: copy it again",
    "same-name": "different files of one name, so that it is unknown which one is meant: keep one of them, or give "
    "each a name of its own",
    "unreadable-nifti": "a NIfTI file is damaged: copy it again",
    "not-a-stack": "a NIfTI file that holds neither a stack (x, y, z) nor a cine (x, y, z, phase) of grey values: "
    "convert it again from DICOM",
    "no-voxel-size": "a NIfTI file whose header gives no voxel size: convert it again from DICOM",
    "not-finite": "a NIfTI file in which no voxel is a finite number: export it again",
    "no-phases-in-table": "rows of the data set's table whose ED or ES is empty or no whole number: such a patient has "
    "no contours; fill the columns ED and ES in with the phases that are drawn, counted from 0",
    "conflicting-rows": "two rows of the data set's table contradict each other",
    "not-in-table": "images whose name has no row in the folder's table (cases.csv, or scd_patientdata.csv)",
    "unreadable-contour": "a contour file that is no list of points, two numbers a line: copy it again",
    "no-phases": "a 4D NIfTI file was expected, with two phases or more along its fourth axis",
    "masks-differ": "image and mask have different shapes or numbers of phases: draw them on these images",
    "masks-misaligned": "the masks lie outside the images: their affine does not agree with the scans",
    "masks-implausible": "labels other than expected, no phase with a left ventricle, equal ones in all, or one with "
    "it and another with myocardium alone",
    "cavity-outside-myocardium": "the left cavity does not lie in the myocardium: the label map may be wrong",
    "labels-too-wide": "labels spread wider than a heart: a stray label, or a wrong pixel spacing",
    "ef-implausible": "the masks' ejection fraction is 95 % or more: slices are missing at end-systole",
    "burned-in-annotation": "images marked as holding burned-in text, which may name the patient: export them without",
    "heart-beyond-crop": "the left ventricle reaches beyond a case's 160 mm: the pixel spacing may be wrong",
    "ambiguous-masks": "one mask file for several studies: keep each next to its own scans",
    "no-orientation": "a NIfTI file that does not know the patient's axes: convert it again from DICOM; or give "
    "--axes short-axis, if you know that all such files are short-axis stacks seen from the apex",
    "not-short-axis": "a NIfTI stack whose slices do not lie across the heart's long axis: export the short axis; "
    "where it is one and a tool lost its orientation, convert it again from DICOM, or give --axes short-axis",
    "unreadable-segmentation": "a DICOM segmentation that is damaged, or that does not fit the images it refers to",
    "segmentation-of-no-phase": "a DICOM segmentation that names several phases for one frame and not the one it was "
    "drawn on: export it with a reference to that image alone, or take it away to go on without these contours",
    "parser-crashed": "the parser or decoder broke down over a file: it is damaged, or made to do so",
    "too-slow": "a file or study took too long to read",
    "too-large": "files beyond the limits of size, nesting or number of elements, or that need too much memory",
    "unexpected-error": "the reader failed: please report the kind of scanner and export",
    "conflicting-copies": "two different images with the number, place and time of one: export the study again",
    "mixed-patients": "one study with two patients' numbers: export each patient's own",
    "no-patient-id": "studies without a patient's number (PatientID), or with zeros or a word such as UNKNOWN instead, "
    "so that two of them may be one person's: export with numbers or pseudonyms; or --one-study-one-patient, if you "
    "know that no patient has two studies here",
    "no-issuer": "studies that do not say who issued the patient's number (IssuerOfPatientID), which --issuers-differ "
    "needs: export with it, or leave the option out",
    "issuers-of-one-person": "studies whose number, name and birth date agree under two issuers: one person, who must "
    "not count as two: export with one spelling of the issuer, or leave --issuers-differ out",
    # files, and series of a usable study
    "not-dicom": "files that are not DICOM",
    "damaged-header": "files that begin like DICOM and cannot be parsed",
    "unreadable": "files or folders that this account may not read",
    "no-regular-file": "devices, pipes, links that lead nowhere, and linked folders that are read anyway",
    "system-file": "files that a system made for itself (._ twins and __MACOSX of a Mac, .DS_Store, Thumbs.db): "
    "nothing is missing",
    "archive": "archives (zip, tar, 7z, rar, gz), which are not opened: unpack each into a folder of its own",
    "other-file": "files that are no part of this layout, or lie where it expects none: see 'prepare --help' for what "
    "it expects",
    "deflated": "files in a compressed transfer syntax that is refused unopened",
    "dicomdir": "directories of the exported files, which hold no images",
    "not-grayscale": "colour images: reports, maps and screenshots",
    "no-decoder": "files in a transfer syntax that no decoder here reads: export uncompressed",
    "unplaced-frames": "multi-frame files that do not say where each frame was taken: export as classic MR images",
    "not-mr-image": "other objects: reports, masks, secondary captures, other modalities",
    "other-segmentation": "DICOM segmentations of other images, or without a ventricle or myocardium",
    "masks-without-frames": "mask files whose name has no frames",
    "no-geometry": "images without a usable position, orientation or pixel spacing",
    "no-uid": "images that do not say which study, series or instance they are",
    "duplicate": "copies of an image that is already there",
    "not-cine": "series or slices with too few phases: localisers, late enhancement, perfusion",
    "repeated-slices": "cine series of the same slices that are not the last, or of another sequence: repeats, tagging",
    "other-orientation": "series of another orientation, or with too few slices: long axis, axial, outflow tract",
    # studies that an archive did not hand over
    "not-in-archive": "accession numbers or study UIDs of the list of which the archive has no study with MR images: "
    "are they spelt as there?",
    "study-vanished": "studies that the archive named and no longer has: they were deleted or moved",
    "archive-error": "studies over which the archive answers with an error, three times in a row: see its own log; the "
    "same command asks for them again",
    "incomplete-fetch": "studies of which the archive handed over fewer images than it names, three times in a row: "
    "one may be damaged, or stored in a way that it cannot send; the same command asks for them again",
    "vendor-not-said": "studies whose scanner's vendor the archive does not say or that name several: leave vendor= "
    "out of --query, or list the studies that you want",
    # cases that were made all the same
    "burned-in-suspected": "scans that seem to show letters, perhaps a name: look at them; export them without, or "
    "give --keep-suspected where there are none",
    "unknown-vendor": "cases whose scans name no known vendor, or several: not trained on; repeat 'prepare' with "
    "--vendor if the scans that name none are all of one vendor",
    "vendor-given": "cases whose scans name no vendor and that count as --vendor's",
    "vendor-contradicted": "cases whose scans name another vendor than --vendor: the scans' own was kept",
    "conflicting-patient-id": "cases of a patient's number that stands for several names, birth dates or sexes: they "
    "count as one patient, so that persons who share it train less and are protected less: export with true numbers",
    "several-issuers": "cases of a number that two issuers (IssuerOfPatientID) gave out: they count as one patient, so "
    "that persons who share it train less and are protected less; prepare into another folder with --issuers-differ, "
    "if you know that each issuer numbers its own patients",
    "issuers-apart": "cases of a number that another issuer gave out too: with --issuers-differ they are two patients. "
    "More of them than you expect: the issuer may be spelt in several ways",
    "two-numbers-one-person": "cases whose patient's name and birth date stand under another number too: perhaps one "
    "person, who then counts as two and is protected half as well: export with one number for each",
    "synthetic-data": "cases whose files say that they are synthetic (SyntheticData), which may be true of a part of a "
    "patient's image alone: private, unless you give --simulated because no patient is behind any",
    "heart-by-motion": "cases without masks in which the segmenter found no ventricle: they are centred on what moves, "
    "which may be centimetres off: look at them in check.html, and leave out those whose heart is cut off",
    "contours-displaced": "cases whose drawn left cavity fits the images far better 8 mm or more away: the contours "
    "may belong to another crop, matrix or series; look at them in check.html, and export them again",
    "auto-to-check": "cases with automatic contours of which the segmenter is less sure: look at them in check.html, "
    "and remove the line of cases.csv where they are wrong",
    "auto-not-found": "cases without automatic contours: the segmenter found no left ventricle with muscle and a right "
    "ventricle at both phases",
    "auto-implausible": "cases without automatic contours: what the segmenter found has not the length, volume, muscle "
    "or ejection fraction of a left ventricle",
    "auto-uncertain": "cases without automatic contours: the segmenter is too unsure of them",
    "partly-drawn": "cases of which not all is drawn: left ventricle, myocardium and right ventricle in every slice at "
    "end-diastole and end-systole. The rest counts as unknown: 'check' says what they can be used for, "
    "and 'prepare --contours auto' into a new folder has it found",
    "no-ejection-fraction": "cases whose masks, if any, give no ejection fraction, and whose patient has several "
    "studies, or no row in the table of EFs",
    "unused-row": "rows of the table of EFs whose patient has no study to prepare: are they spelt as in the scans?",
}
"""Every code with what it means, in words for the person who exports scans."""


class Unusable(Exception):  # noqa: N818
    """A study, series or file that cannot become a case; holds a code of `REASONS` and nothing of the patient."""

    def __init__(self, code: str) -> None:
        assert code in REASONS, code
        super().__init__(code)
        self.code = code
