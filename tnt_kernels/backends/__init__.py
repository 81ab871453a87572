"""One module per backend; each computes every operation that it supports."""
