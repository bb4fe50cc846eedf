"""Synthetic cases from the coordinator: what comes over the network is validated before it is kept."""
