"""Models that can be trained: one file each, imported only when its model is asked for."""
