"""The GPU suite: correctness and speed of the CUDA kernels in one resumable run (docs/gpu_suite.md)."""
