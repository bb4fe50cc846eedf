"""Scans -> cases or a reason code: DICOM, ACDC and M&Ms layouts."""
