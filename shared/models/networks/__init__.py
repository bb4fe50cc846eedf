"""What the generative models are built of: the U-Net, its low-rank layers, the autoencoder of a latent space."""
