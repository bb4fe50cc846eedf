"""Fidelity: how far synthetic hearts are from real ones, in images and in anatomy."""
