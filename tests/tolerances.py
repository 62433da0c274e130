"""Every tolerance of the test suite, by what it bounds, with where the number comes from."""

# --- the whole model, embedded file ---------------------------------------------------------------
# Two float32 programs that sum in different orders differ by about sqrt(K) * 2^-24 a product; through
# 6 layers 1 - cosine was measured at 2e-7 (which is float32's own resolution of a cosine near 1).
GOLDEN_FLOAT32_COSINE = 0.999999
# bfloat16 operands round to 2^-9 relative; averaged over K = 256 and 6 layers 1e-4 remains.
GOLDEN_BFLOAT16_COSINE = 0.999
# The recorded float32 logits' own distance from llama.cpp's, to a float32 cosine's resolution.
GOLDEN_LLAMACPP_DIFFERENCE = 1e-5
# Chunks change the shapes of products and so the order of their sums: logits near 10 keep about 5 digits.
CHUNKED_LOGITS = 1e-4

# --- sampling -------------------------------------------------------------------------------------
# Total variation of 20,000 draws over up to 300 tokens: about sqrt(300 / (2 pi 20000)) = 0.05 at worst.
SAMPLING_TOTAL_VARIATION = 0.06

# --- float32 arithmetic ---------------------------------------------------------------------------
# A handful of roundings of 2^-24 each.
FLOAT32_ROUNDINGS = 1e-6
# cos and sin rounded to float32 once (2^-24), their angle to 2^-48 of a turn, times a magnitude up to 1.5;
# the processor's float32 cos and sin are good to 2 units in the last place.
ROPE_TABLES = 1e-6
