"""The synthetic data set as it leaves the study: cases, labels, datasheet, DICOM and NIfTI."""
