"""One family each: model, loss, batches; and what loads them."""
