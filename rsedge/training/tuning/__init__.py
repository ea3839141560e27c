"""Search over recipes, and a learning rate to start from."""
