"""Numbers about a step or a front."""
