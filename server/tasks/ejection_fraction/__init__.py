"""The ResNet50 that predicts a patient's ejection fraction: examples, training, calibration, saliency, model card."""
