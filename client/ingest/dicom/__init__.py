"""DICOM files -> images with what is needed of their headers, and masks from segmentation objects."""
