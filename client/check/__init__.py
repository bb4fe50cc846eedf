"""The report on a folder of prepared cases, for the site's own eyes."""
