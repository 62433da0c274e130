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

# 1 - cosine of a small model's float32 logits to float64's, where its weights do not strain arithmetic: a
# product of K = 256 terms is off by at most about sqrt(K) * 2^-24, whose square over 2 is 4.5e-13.
LOGITS_OF_FLOAT32 = 1e-12

# A token of one layer by the decode kernel: activations are integers of 15 bits, 5e-5 of their root mean
# square (half a step of 1/16256 of the largest of 32), and a float16 cache 2^-12: 1 - cosine is half of the
# squares' sum, some 1e-8 per product. The bar leaves room for a hundred; a wrong part is at 0.9 or below.
DECODE_STEP_COSINE = 0.99999
# The same step in company and alone, where one number of a row rounds otherwise: its integer of 15 bits moves
# by a step, 5e-5 of the root mean square, and so do some that follow. Seen: 1e-4 of logits, 5e-9 of a cosine.
DECODE_STEP_IN_COMPANY = 0.9999998

# --- a model that is split over devices -----------------------------------------------------------
# The same float32 products, their sums in another order: as chunks, a few units in the fifth digit of logits.
MESH_LOGITS = 1e-5
# Sums of K products in another order through two layers: as ops against float64, with room for the second.
MESH_STAGE_NMSE = 1e-9

# --- perplexity -----------------------------------------------------------------------------------
# What the project promises of a backend's perplexity against the float32 reference's, relative.
PERPLEXITY_PROMISE = 1e-3
# Two float32 programs' logits near 10 keep about 5 digits; so does their difference from a logsumexp.
SCORED_LOG_LIKELIHOOD = 1e-4
# The same program with another BLAS, rounded to float32 in the recording.
RECORDED_LOG_LIKELIHOOD = 1e-4

# --- sampling -------------------------------------------------------------------------------------
# Total variation of 20,000 draws over up to 300 tokens: about sqrt(300 / (2 pi 20000)) = 0.05 at worst.
SAMPLING_TOTAL_VARIATION = 0.06

# --- float32 arithmetic ---------------------------------------------------------------------------
# A handful of roundings of 2^-24 each.
FLOAT32_ROUNDINGS = 1e-6
# cos and sin rounded to float32 once (2^-24), their angle to 2^-48 of a turn, times a magnitude up to 1.5;
# the processor's float32 cos and sin are good to 2 units in the last place.
ROPE_TABLES = 1e-6

# --- wgpu -----------------------------------------------------------------------------------------
# Float32 sums of K products: NMSE near K * 2^-50 if roundings were independent, 1e-12 at K = 4096;
# measured up to 3e-13 (5e-13 with heavy tails). The bar leaves room for other drivers' contractions.
WGPU_NMSE = 1e-10
WGPU_ATTENTION_NMSE = 1e-10
# Activations of long prompts are whole numbers up to 32639, times a scale for 32 of them: each is off by at
# most half a scale, which is at most sqrt(32) / 32639 of the block's root mean square. So the error has
# 32 / (12 * 32639^2) of its power. Uniform ones have a tenth of it, 2.3e-10 measured; their SwiGLU 4e-10.
WGPU_TOP = 32639
WGPU_DOTS_NMSE = 32 / (12 * WGPU_TOP**2)
# Six layers of four such products each, whose errors add up, and as much again for what norms make of them.
WGPU_DOTS_STAGE_NMSE = 48 * WGPU_DOTS_NMSE
# exp to a few units in the last place, and a sum of up to 288 of them.
WGPU_ROUTER_WEIGHTS = 1e-5
# The whole embedded model in float32: measured 1 - cosine 2e-12 and NMSE 1e-12.
WGPU_COSINE = 0.99999
WGPU_LOGITS_NMSE = 1e-9
WGPU_STAGE_NMSE = 1e-9
# float16 keeps 11 bits: 2^-24 NMSE of one value, a little more after the softmax.
WGPU_FLOAT16_CACHE_NMSE = 1e-5
WGPU_FLOAT16_CACHE_COSINE = 0.9999
# 2,000 draws over up to 300 tokens: about sqrt(300 / (2 pi 2000)) = 0.155 at worst.
WGPU_TOTAL_VARIATION = 0.16

# --- integer dots on the CPU ----------------------------------------------------------------------
# Activations are whole numbers up to this, times a scale for 256 of them: each is off by half a scale.
NATIVE_TOP = 16256
# Sums of float32 beside that, relative to the sum of the terms' sizes: a term passes some twenty roundings
# of 2^-24 (16 lanes, 8 groups, up to 16 superblocks, its scales).
NATIVE_FLOAT32_SUMS = 40 * 2.0**-24
# Relative error of an expert's output: the largest of 256 normal activations is at 3 deviations, so a step is
# 3 / 16256 and an error of that / sqrt(12), 5.3e-5, in each of three products; silu's slope is up to 1.1.
NATIVE_MOE = 3e-4
# The embedded model: 6 layers of 7 products with a relative error of 5.3e-5 each, which add up as a walk to
# sqrt(42) * 5.3e-5 = 3.4e-4, and 1 - cosine is half of its square: 6e-8. Float32's own is 1e-7.
NATIVE_COSINE = 0.999999
# Attention in float32, relative to the largest value. A score is a sum of 128 products of numbers of up to
# 8 and 4, over sqrt(128): its lanes pass a dozen roundings of sums of some 5, 5e-6 at most; a weight is off
# by that much, and by 2 units of exp. The weighted sum adds a rounding per key of a section, as a walk:
# sqrt(1024) * 2^-25 = 1e-6.
NATIVE_ATTENTION = 1e-5
# Two forms compute the same whole numbers; their float32 operations differ where one fuses more.
NATIVE_FORMS = 4 * 2.0**-24

# --- ops, normalized mean squared error against float64 -------------------------------------------
# Sums of K float32 products round to about sqrt(K) * 2^-24 at worst: NMSE 1e-12 for K = 4096.
MATMUL_FLOAT32_NMSE = 1e-10
# Each bfloat16 operand rounds by 2^-9 at most, 1.6e-3 rms: two operands give an NMSE of about 6e-6.
MATMUL_BFLOAT16_NMSE = 2e-5
# Three products in a row, and silu of the first.
MOE_FLOAT32_NMSE = 1e-10
MOE_BFLOAT16_NMSE = 5e-5
# Gradients are compared with another float32 program: twice the noise, through cancelling sums.
GRADIENT_NMSE = 1e-9
# Central differences in float64 with a step of 1e-5, against float32 gradients.
GRADIENT_RELATIVE = 1e-4
# Softmax and two short sums in float32.
ATTENTION_NMSE = 1e-9
# Probabilities below 1, a few roundings of 2^-24 relative.
ROUTER_WEIGHTS = 1e-6

# --- prefill kernels for Hopper -------------------------------------------------------------------
# float16 rounds by 2^-11 at most, 2e-4 rms; x, the scale, the minimum and their result are rounded,
# and the two of a subblock are shared by 32 weights: NMSE 1.6e-7 measured.
MATMUL_FLOAT16_NMSE = 8e-7
# Two products and SwiGLU one after the other: 3.8e-7 measured.
MOE_FLOAT16_NMSE = 2e-6
# Softmax weights and results rounded to bfloat16, 1.6e-3 rms each, the weights' errors averaged out.
ATTENTION_BFLOAT16_NMSE = 1e-5

# --- int8 KV cache --------------------------------------------------------------------------------
# The same int8 values in another batch, but one that lies between two by a float32 rounding may step
# to the other, 1/254 of its vector's largest: a few of thousands, so logits near 10 move by thousandths.
INT8_STEP_LOGITS = 2e-2
# Each cached vector's values round by up to 1/254 of its largest, uniformly: with a largest value of 2.5
# to 4 root mean squares (head_dim 64) 0.6 to 0.9 % rms, NMSE 3e-5 to 8e-5 of keys and of values. Cosines
# lose about half the NMSE of what enters the logits, averaged over keys: 3e-5 measured over 4,096 tokens,
# 7.4e-4 at the worst of them, where few keys have all the weight; the contract's bar for reduced
# precision is 1e-3.
INT8_CACHE_MEAN = 1e-4
INT8_CACHE_WORST = 1e-3

# A new token's key or value is a product with activations of 15 bits: 5e-5 of its root mean square, of
# which the largest of 64 or 128 is two or more; the bar has room for three such errors. And one in
# 5e-5 * 127 / 2.5, 0.3 %, of its int8 lies so near to the middle between two that it steps to the other one;
# six times that.
INT8_SCALE = 1e-4
INT8_STEPS = 0.02

# Operands of 11 bits in three layers (an op gives 2e-7 to 6e-7), keys, values and softmax weights in
# float16; values of the caches that were there before are equal.
DECODE_LAYERS_NMSE = 5e-5
# Of the logits' standard deviation: experts closer than three errors of that size may change places.
ROUTER_TIE = 3 * DECODE_LAYERS_NMSE**0.5

# Relative error of the time that a batch still takes, from a fifth of its lines on. The mean of 80 answers
# that use a uniform share of their limits is known to 0.58 / sqrt(80) = 6.5 %: two of that. And 16 of 96
# lines are still running, which are longer than those that ended: at most half of their share, 8 %.
BATCH_ESTIMATE = 0.21

# Log-probabilities of logits near 10 in float32, read in other chunks: sums of thousands of products whose
# order differs, a few units in the last place (1e-6 of the value) of each of a few layers.
TOKEN_SCORES = 1e-4
