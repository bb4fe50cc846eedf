"""The networks that segment; each turns (N, C, H, W) into (N, out_channels, H, W)."""
