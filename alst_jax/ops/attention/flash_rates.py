"""Measured speed of flash-attn-4 on an H100 80GB, called from JAX 0.11.2: TFLOP/s at head dim 128, bfloat16, batch 1.

The causal half counts; a backward pass counts as 2.5 forward passes. Measured 2026-11-27 with flash-attn-4 4.0.0b36.
"""

# By tokens of the sequence, with 32 query heads and 8 kv heads; 524,288 with 4 and 1. 32,768 was measured from torch.
RATES = {
    "flash": {"forward": {32768: 727, 131072: 706, 524288: 708}, "backward": {32768: 601, 131072: 595, 524288: 623}},
    # Sums in a fixed order cost more where heads or blocks are many.
    "flash-deterministic": {"forward": {32768: 698, 131072: 685}, "backward": {32768: 534, 131072: 380}},
}
# The same with fewer query heads in one call, four a kv head.
RATES_BY_HEADS = {4: {"forward": {131072: 681, 524288: 708}, "backward": {131072: 639, 524288: 623}}}
# Packed documents in 131,072 tokens, 32 query heads and 8 kv heads: TFLOP/s of useful work by the sum of the documents'
# squares over the sum of their lengths, for 512, 64 and 16 equal documents, 8 mixed ones and one. Those with 512, 16
# and 1 were measured from torch.
DOCUMENT_RATES = {
    "forward": {256: 103, 2048: 470, 8192: 643, 25360: 661, 131072: 697},
    "backward": {256: 76, 2048: 395, 8192: 550, 25360: 604, 131072: 601},
}
