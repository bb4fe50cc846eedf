"""The study's experiments: which model is trained on what, and on whose patients it is tested."""
