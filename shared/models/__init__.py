"""The generative models: one interface, one file a kind, their networks, and the file of a public prior."""
