"""Rehearsal of a study: the whole path with every registered site, without a patient and without a charge."""
