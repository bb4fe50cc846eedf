"""A regressor's answers judged: figures with intervals, per vendor, per class of ejection fraction and per subgroup."""
