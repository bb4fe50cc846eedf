"""The two networks: the generator every site fine-tunes and the regressor of the central stage."""
