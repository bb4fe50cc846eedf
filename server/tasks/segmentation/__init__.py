"""The segmenter: training, and its use as an independent evaluator of generated images."""
