"""Graphs → token ids → text: greedy, beam search, sampling, with in-flight batching."""
