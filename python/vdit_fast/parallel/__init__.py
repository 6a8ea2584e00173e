"""Several processes for one video: stage pipelines, sequence and guidance parallelism over torch.distributed."""
