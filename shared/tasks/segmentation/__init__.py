"""The segmenter that finds ventricles and muscle: network and inference."""
