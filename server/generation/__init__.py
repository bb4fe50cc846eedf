"""The generator at the server: heart shapes, rendering, pre-training of the public prior, synthesis."""
