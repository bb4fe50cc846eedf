"""The service that brings synthetic cases back to the partners."""
