"""A site between institutions: its key, which code it lets in, and its SuperNode."""
