"""Re-routing: the specification in PyTorch, the kernels in C++ and CUDA, and the arrays that they read at run time."""
