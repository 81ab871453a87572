// Compiled once per SIMD tier with -DTNT_TIER=<tier>: the tier's table of gradient kernels.
#include "gelu_backward.h"
#include "inner_block_backward.h"
#include "layer_norm_backward.h"
#include "outer_attention_backward.h"
#include "pixel_embed_backward.h"
#include "word_to_sentence_backward.h"

namespace tnt {
namespace TNT_TIER {

extern const GradientKernels gradients;
const GradientKernels gradients = {inner_block_backward,     pixel_embed_backward, word_to_sentence_backward,
                                   outer_attention_backward, layer_norm_backward,  gelu_backward};

}  // namespace TNT_TIER
}  // namespace tnt
