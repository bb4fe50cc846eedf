"""What a hospital and the server must agree on: settings, cases, anatomy, networks, privacy, wire records."""
