"""Synthetic cases from the coordinator: what comes over the network is judged before it is kept."""
