"""Find tiles in files of embeddings: exact and approximate search, filters, hits."""
