"""L4, tensors: checkpoints, models, sampling and the runner that executes step plans. The only package that imports torch."""
