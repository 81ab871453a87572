#include "pixel_embed.h"
namespace tnt { namespace cuda {
int64_t pixel_embed_backward_workspace(const PixelEmbed&, const PixelEmbedGradients&) { return 0; }
int pixel_embed_backward(const PixelEmbed&, const PixelEmbedGradients&, void*, void*) { return 1; }
}}
