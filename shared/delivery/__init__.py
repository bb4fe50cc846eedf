"""The wire contract of the delivery of synthetic cases: `delivery.proto`, and the code made from it."""
