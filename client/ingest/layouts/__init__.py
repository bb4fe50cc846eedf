"""Data sets' own layouts, and tables next to the scans."""
