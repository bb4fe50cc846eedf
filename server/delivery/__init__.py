"""Synthetic cases back to the partners: a gRPC service over TLS, with a token for every site."""
