#include <ATen/NativeFunctions.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

// One more torch device whose memory is the machine's own: every operator runs on the
// CPU, on copies, and operators that get tensors of two devices fail as on a real one.

namespace {

using at::Tensor;
constexpr auto kType = c10::DeviceType::PrivateUse1;

void release(void* data) { c10::free_cpu(data); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    return {data, data, &release, c10::Device(kType, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const final {
    std::memcpy(to, from, count);
  }
};
Allocator allocator;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device device() const { return c10::Device(kType, 0); }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  // All is done when it is asked for.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
Hooks hooks;

const c10::DispatchKeySet kKeys{c10::DispatchKey::PrivateUse1};

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator, kKeys,
      dtype.value_or(at::kFloat));
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, kKeys, dtype.value_or(at::kFloat), format);
}

// The same bytes seen as a CPU tensor.
Tensor on_cpu(const Tensor& x) {
  if (x.is_cpu()) return x;
  auto storage = x.storage();
  auto options = x.options().device(at::kCPU);
  auto base = at::from_blob(
      storage.mutable_data(), {static_cast<int64_t>(storage.nbytes() / x.itemsize())},
      options);
  return at::as_strided(base, x.sizes(), x.strides(), x.storage_offset());
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool) {
  if (target.numel()) on_cpu(target).copy_(on_cpu(self));
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  at::native::resize_(target, self.sizes(), std::nullopt);
  return copy_from(self, target, false);
}

at::Scalar local_scalar(const Tensor& self) { return on_cpu(self).item(); }

Tensor& set_storage(
    Tensor& result, at::Storage storage, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(result, storage, offset, size, stride);
}

// Torch asks a device without kernels of its own for these two by name.
Tensor convolution(
    const Tensor& x, const Tensor& w, const std::optional<Tensor>& b,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(x.device() == w.device(), "Expected all tensors to be on the same device");
  std::optional<Tensor> bias;
  if (b.has_value() && b->defined()) bias = on_cpu(*b);
  return at::convolution(on_cpu(x), on_cpu(w), bias, stride, padding, dilation,
                         transposed, output_padding, groups).to(x.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  int64_t outputs = transposed ? w.size(1) * groups : w.size(0);
  std::vector<int64_t> bias_sizes{outputs};
  auto result = at::convolution_backward(
      on_cpu(g), on_cpu(x), on_cpu(w), at::IntArrayRef(bias_sizes), stride, padding,
      dilation, transposed, output_padding, groups, mask);
  auto there = [&](const Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  return {there(std::get<0>(result)), there(std::get<1>(result)), there(std::get<2>(result))};
}

// It writes running statistics without saying so in its schema.
std::tuple<Tensor, Tensor, Tensor> batch_norm(
    const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, bool training,
    double momentum, double eps) {
  auto here = [&](const std::optional<Tensor>& t) -> std::optional<Tensor> {
    if (!t.has_value() || !t->defined()) return std::nullopt;
    TORCH_CHECK(t->device() == x.device(), "Expected all tensors to be on the same device");
    return on_cpu(*t);
  };
  auto [y, m, v] = at::native_batch_norm(
      on_cpu(x), here(w), here(b), here(mean), here(var), training, momentum, eps);
  return {y.to(x.device()), m.to(x.device()), v.to(x.device())};
}

void refuse(const Tensor& x, const c10::OperatorHandle& op) {
  TORCH_CHECK(!x.defined() || !x.is_cpu() || x.dim() == 0,
              "Expected all tensors to be on the same device, in ", op.schema().name());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) refuse(value.toTensor(), op);
    if (value.isTensorList())
      for (const Tensor& x : value.toTensorList().vec()) refuse(x, op);
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("native_batch_norm", batch_norm);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("set_.source_Storage_storage_offset", set_storage);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", [] {
    c10::SetAllocator(kType, &allocator);
    at::RegisterPrivateUse1HooksInterface(&hooks);
  });
}
