"""The federation: strategy, state, validation of replies, adapters, vendor styles, accounting."""
