"""One run over scenes: read ahead, compute, keep a journal, write."""
