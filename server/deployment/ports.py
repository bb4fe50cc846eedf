"""Ports of a coordinator's services where `coordinator.yaml` does not say otherwise."""

SUPERLINK_PORT = 8443
HEALTH_PORT = 9095
GATEWAY_PORT = 443
DELIVERY_PORT = 8444
