"""What runs the graphs of a bundle: ONNX Runtime on CPU and CUDA, TensorRT."""
