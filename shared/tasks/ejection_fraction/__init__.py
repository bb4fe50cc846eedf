"""The ResNet50 that predicts a patient's ejection fraction: network, centring of the ventricle, inference."""
