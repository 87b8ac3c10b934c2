"""Applications over the kernels and the method: command line, training, evaluation, data, files."""
