"""ONNX graphs, node by node: builder, precision, encoder, steps, caches."""
