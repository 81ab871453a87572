// Python's side of csrc/cuda, the module's submodule `cuda`: checks sizes, releases the GIL, and raises the
// error that CUDA reports. Pointers are integers and of the device; 0 means absent.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace {

using tnt::cuda::PixelEmbed;
using tnt::cuda::PixelEmbedGradients;

void* pointer(uintptr_t p) { return reinterpret_cast<void*>(p); }
float* floats(uintptr_t p) { return reinterpret_cast<float*>(p); }

void need(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

int type_of(int code) {
  need(code >= tnt::cuda::kFloat32 && code <= tnt::cuda::kFloat16,
       "dtype code is neither 0 (float32), 1 (bfloat16) nor 2 (float16)");
  return code;
}

int image_type_of(int code) { return code == tnt::cuda::kUint8 ? code : type_of(code); }

int small(int64_t size, const char* what) {
  need(size >= 1 && size <= INT_MAX, what);
  return static_cast<int>(size);
}

template <class Launch>
void call(const Launch& launch) {
  int error;
  {
    py::gil_scoped_release release;
    error = launch();
  }
  if (error != 0) throw std::runtime_error(tnt::cuda::error_name(error));
}

PixelEmbed pixel_embed(uintptr_t image, int image_dtype, const std::vector<int64_t>& strides, int64_t batch,
                       int64_t channels, int64_t height, int64_t width, const std::vector<uintptr_t>& params,
                       const std::vector<int>& param_dtypes, uintptr_t out, int out_dtype, int compute_dtype,
                       bool allow_tf32, int64_t c, int64_t kernel, int64_t patch_h, int64_t patch_w,
                       int64_t stride, bool legacy, const std::vector<float>& scale,
                       const std::vector<float>& shift) {
  need(strides.size() == 4, "pixel_embed: four strides needed");
  need(params.size() == 3 && param_dtypes.size() == 3, "pixel_embed: weight, bias and position needed");
  need(batch >= 0 && channels >= 1 && height >= 1 && width >= 1 && c >= 1,
       "pixel_embed: batch >= 0, channels, height, width and c >= 1 needed");
  need(kernel >= 1 && kernel % 2 == 1, "pixel_embed: kernel must be odd");
  need(stride >= 1 && patch_h >= 1 && patch_w >= 1, "pixel_embed: stride and patch must be at least 1");
  need(height % patch_h == 0 && width % patch_w == 0, "pixel_embed: patch must divide the image");
  need(!legacy || (patch_h % stride == 0 && patch_w % stride == 0),
       "pixel_embed: legacy needs stride to divide patch");
  need(params[0] != 0, "pixel_embed: weight is needed");
  need(batch == 0 || image != 0, "pixel_embed: image must not be null");
  if (image_dtype == tnt::cuda::kUint8) {
    need(channels <= tnt::cuda::kMostByteChannels, "pixel_embed: a uint8 image has too many channels");
    need(static_cast<int64_t>(scale.size()) == channels && static_cast<int64_t>(shift.size()) == channels,
         "pixel_embed: scale and shift of every channel needed");
  }
  PixelEmbed args{pointer(image),
                  image_type_of(image_dtype),
                  {strides[0], strides[1], strides[2], strides[3]},
                  batch,
                  channels,
                  height,
                  width,
                  pointer(params[0]),
                  type_of(param_dtypes[0]),
                  pointer(params[1]),
                  type_of(param_dtypes[1]),
                  pointer(params[2]),
                  type_of(param_dtypes[2]),
                  pointer(out),
                  type_of(out_dtype),
                  type_of(compute_dtype),
                  allow_tf32,
                  c,
                  small(kernel, "pixel_embed: kernel must fit 32 bits"),
                  small(patch_h, "pixel_embed: patch must fit 32 bits"),
                  small(patch_w, "pixel_embed: patch must fit 32 bits"),
                  small(stride, "pixel_embed: stride must fit 32 bits"),
                  legacy,
                  {},
                  {}};
  if (image_dtype == tnt::cuda::kUint8) {
    std::copy(scale.begin(), scale.end(), args.scale);
    std::copy(shift.begin(), shift.end(), args.shift);
  }
  need(tnt::cuda::is_valid(args), "pixel_embed: more patches, words or taps than 32 bits count");
  return args;
}

PixelEmbedGradients pixel_embed_gradients(uintptr_t grad, int grad_dtype, uintptr_t image, int image_dtype,
                                          uintptr_t weight, uintptr_t bias, uintptr_t position) {
  return {pointer(grad),  type_of(grad_dtype), pointer(image),  type_of(image_dtype),
          floats(weight), floats(bias),        floats(position)};
}

}  // namespace

void bind_cuda(py::module_& native) {
  py::module_ module = native.def_submodule("cuda", "Kernels for NVIDIA GPUs.");
  module.attr("version") = TNT_CUDA_VERSION;
  module.attr("most_byte_channels") = tnt::cuda::kMostByteChannels;  // channels of a uint8 image
  module.attr("architectures") = std::vector<int>{TNT_CUDA_ARCHITECTURES};
  module.def("probe", [] { call(tnt::cuda::probe); });
  py::class_<PixelEmbedGradients>(module, "PixelEmbedGradients")
      .def(py::init(&pixel_embed_gradients), py::arg("grad"), py::arg("grad_dtype"), py::arg("image"),
           py::arg("image_dtype"), py::arg("weight"), py::arg("bias"), py::arg("position"));
  py::class_<PixelEmbed>(module, "PixelEmbed")
      .def(py::init(&pixel_embed), py::arg("image"), py::arg("image_dtype"), py::arg("strides"),
           py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("params"),
           py::arg("param_dtypes"), py::arg("out"), py::arg("out_dtype"), py::arg("compute_dtype"),
           py::arg("allow_tf32"), py::arg("c"), py::arg("kernel"), py::arg("patch_h"), py::arg("patch_w"),
           py::arg("stride"), py::arg("legacy"), py::arg("scale") = std::vector<float>{},
           py::arg("shift") = std::vector<float>{})
      .def("workspace", &tnt::cuda::pixel_embed_workspace)
      .def(
          "run",
          [](const PixelEmbed& args, uintptr_t workspace, uintptr_t stream) {
            if (args.batch == 0) return;
            need(args.out != nullptr, "pixel_embed: out must not be null");
            call([&] { return tnt::cuda::pixel_embed(args, pointer(workspace), pointer(stream)); });
          },
          py::arg("workspace"), py::arg("stream"))
      .def("backward_workspace", &tnt::cuda::pixel_embed_backward_workspace, py::arg("gradients"))
      .def(
          "run_backward",
          [](const PixelEmbed& args, const PixelEmbedGradients& gradients, uintptr_t workspace,
             uintptr_t stream) {
            need(args.batch == 0 || gradients.grad != nullptr, "pixel_embed: grad must not be null");
            call([&] {
              return tnt::cuda::pixel_embed_backward(args, gradients, pointer(workspace), pointer(stream));
            });
          },
          py::arg("gradients"), py::arg("workspace"), py::arg("stream"));
}
