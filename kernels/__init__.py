"""The kernels, one file per operation and backend; import them as `anpgpu.kernels`."""
