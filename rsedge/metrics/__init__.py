"""Numbers from predictions: captions, retrieval, zero-shot classification, comparisons. No torch, no files."""
