// Compiled once per SIMD tier with -DTNT_TIER=<tier>: the tier's table of kernels.
#include "add_layer_norm.h"
#include "inner_block.h"
#include "outer_attention.h"
#include "pixel_embed.h"
#include "word_to_sentence.h"

namespace tnt {
namespace TNT_TIER {

extern const Kernels kernels;
const Kernels kernels = {inner_block, pixel_embed, word_to_sentence, add_layer_norm, outer_attention};

}  // namespace TNT_TIER
}  // namespace tnt
