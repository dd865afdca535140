"""The kernels for a GPU, in Triton: imported only where a request is on one, since importing Triton takes half a second."""
