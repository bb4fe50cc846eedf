"""What every training of the server shares: its state, and augmentation."""
