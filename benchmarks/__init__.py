"""Benchmarks of the ops, of whole models and of training, beside what people use today."""
