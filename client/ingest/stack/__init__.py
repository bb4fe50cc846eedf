"""Images of a study -> the short-axis cine among them, its slices and phases in order."""
