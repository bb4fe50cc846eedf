"""Simulated hospitals with their scanners, the whole path on one machine, and the benchmarks."""
