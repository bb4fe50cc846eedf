"""Evaluation of predictions: figures with intervals, per vendor, class of ejection fraction and subgroup."""
