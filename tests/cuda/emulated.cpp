// What test_cuda_kernels.py calls in the emulated kernels.
#include "emulator.h"
#include "pixel_embed.h"

using namespace tnt::cuda;

extern "C" {

void run_backwards(int yes) { emulator::backwards() = yes != 0; }

int64_t forward_workspace(const PixelEmbed* args) { return pixel_embed_workspace(*args); }
int forward(const PixelEmbed* args, void* workspace) { return pixel_embed(*args, workspace, nullptr); }

int64_t backward_workspace(const PixelEmbed* args, const PixelEmbedGradients* gradients) {
  return pixel_embed_backward_workspace(*args, *gradients);
}
int backward(const PixelEmbed* args, const PixelEmbedGradients* gradients, void* workspace) {
  return pixel_embed_backward(*args, *gradients, workspace, nullptr);
}
}
