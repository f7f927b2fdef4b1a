"""What goes wrong when gradients are taken sample by sample."""


class PerSampleError(RuntimeError):
    """The gradients can't be had sample by sample; the message says where and why, and what to do instead."""


class UnsupportedLayerError(PerSampleError):
    """A layer's gradient can't be split over the samples, or a tensor in it can't be matched to them."""
