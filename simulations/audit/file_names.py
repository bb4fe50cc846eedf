"""Files that the audits write into a run folder."""

SIMULATED_PAIRS = "audit_pairs.png"
"""The nearest pairs, where every patient shown is simulated."""
