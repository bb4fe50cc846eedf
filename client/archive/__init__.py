"""The way from a hospital's archive (PACS) to a folder of cases."""
