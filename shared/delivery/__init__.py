"""The wire contract of the delivery service: what the coordinator's server and a site's `fetch` must agree on."""
