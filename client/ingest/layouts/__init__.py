"""Data sets' own layouts, and tables beside the scans."""
