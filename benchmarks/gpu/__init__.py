"""`python3 -m benchmarks.gpu`: what a GPU makes of training, measured in a few minutes, with a table as it goes."""
