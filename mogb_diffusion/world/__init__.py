"""The tiny world: captioned pictures of 16 x 16 pixels, small enough for two CPU cores to learn."""
