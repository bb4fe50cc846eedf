"""Names of files that one side writes and another reads; `fedcmr.shared.case.INDEX_NAME` is the one of every folder."""

PREPARED_NAME = "prepared.json"
"""In every prepared folder: settings, the key's check and, under `provenance`, where the scans come from."""
MASKS_NAME = "masks.nii.gz"
"""Next to a study's DICOM files: its labels, axes (x, y, z, phase)."""
DATASHEET_NAME, CHECKSUMS_NAME = "DATASHEET.md", "SHA256SUMS"
"""In every released data set, and in every fetched copy of one."""
