"""Simulated patients: who comes to a hospital, their beating hearts, and what surrounds these."""
