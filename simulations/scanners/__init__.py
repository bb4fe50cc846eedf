"""Simulated scanners of three vendors: contrast, acquisition, receive chain, and the DICOM files that they export."""
