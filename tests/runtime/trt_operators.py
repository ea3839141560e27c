"""What TensorRT's ONNX parser imports, as far as our graphs are concerned, from onnx-tensorrt's own documents.

``10.15``: ``docs/operators.md`` of that release ("TensorRT 10.15 supports operators in the inclusive range of opset 9
to opset 24"), the last list before 11 that was at hand; 11 adds operators and removes none that is documented.

``10.3``: ``docs/operators.md`` of 8.5 and what ``docs/Changelog.md`` adds up to 10.3 (LayerNormalization and TopK with
K at run time in 8.6, INT64 in 9.0). ``Gelu`` is of opset 20, which the list of 10.0 covers ("opset 9 to opset 20") and
for which the bindings of 10.3.0 have the layers (``ActivationType.GELU_ERF``, ``GELU_TANH``); its line in the list of
10.3 itself was not seen.
"""

from __future__ import annotations

_COMMON = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal
Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU HardSigmoid HardSwish Hardmax Identity If
InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM
LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not
OneHot Or Pad Pow PRelu QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
Reshape Resize ReverseSequence RNN RoiAlign Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh
Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
Transpose Trilu Unsqueeze Upsample Where Xor
"""
_SINCE = """
Attention BlackmanWindow CastLike DeformConv HammingWindow HannWindow Mish RMSNormalization RotaryEmbedding STFT
TensorScatter
"""

PARSER_OPERATORS = {
    "10.3": frozenset(_COMMON.split()),
    "10.15": frozenset((_COMMON + _SINCE).split()),
}
"""Version of the list → operators it says are supported."""

CONSTANT_INPUTS = {
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "ReduceL2": (1,),
    "ReduceSum": (1,),
    "ReduceMax": (1,),
}
"""Operator → inputs that the lists want constant; ``K`` of TopK may be given at run time, but below 3840."""
