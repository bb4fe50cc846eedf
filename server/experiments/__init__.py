"""The study's experiments: which model is trained on what, and whose test patients it predicts."""
