"""The study's report: one JSON file for machines, one self-contained HTML page for people."""
