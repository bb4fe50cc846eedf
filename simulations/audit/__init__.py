"""Attacks that try to prove the privacy claim wrong: `fedcmr-audit`."""
