#include "sealed_device.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <limits>
#include <mutex>
#include <set>
#include <vector>

#include "sealed_memory.h"

namespace baseq::test {
namespace {

constexpr auto kSealed = c10::DeviceType::PrivateUse1;

// What makes it a device.

struct SealedAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    return SealedMemory::instance().allocate(static_cast<int64_t>(num_bytes));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override { TORCH_INTERNAL_ASSERT(false, "nobody copies so"); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* of : {&stats.allocated_bytes, &stats.reserved_bytes}) {
      of->front().current = SealedMemory::instance().live_bytes();
      of->front().peak = SealedMemory::instance().peak_bytes();
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { SealedMemory::instance().reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const auto total = static_cast<size_t>(SealedMemory::instance().limit());
    return {total - static_cast<size_t>(SealedMemory::instance().live_bytes()), total};
  }
};
SealedAllocator allocator;
REGISTER_ALLOCATOR(kSealed, &allocator)

struct SealedGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kSealed;
  SealedGuard() = default;
  explicit SealedGuard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kSealed; }
  c10::Device exchangeDevice(c10::Device) const override { return {kSealed, 0}; }
  c10::Device getDevice() const override { return {kSealed, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, SealedGuard)

struct SealedHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

// What is asked of it.

struct Counter {
  std::mutex mutex;
  DeviceWork work;
};
Counter& counter() {
  static auto& only = *new Counter;
  return only;
}

/// Set while the CPU computes an operation: the copies that this takes are none that were asked for.
thread_local bool in_operation = false;

template <class Change>
void count(const Change& change) {
  if (in_operation) return;
  const std::lock_guard lock(counter().mutex);
  change(counter().work);
}

void count_operation(const std::string& name) {
  count([&](DeviceWork& work) {
    ++work.operations;
    ++work.names[name];
  });
}

// The operations that touch memory.

/// The same memory as a host tensor, to be used while it is open.
at::Tensor host_view(const at::Tensor& t) {
  if (t.is_cpu()) return t;
  if (t.numel() == 0) return at::empty(t.sizes(), t.options().device(at::kCPU));
  return at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  if (self.is_cpu()) count([](DeviceWork& work) { ++work.to_device; });
  else if (to.is_cpu()) count([](DeviceWork& work) { ++work.to_host; });
  else count_operation("aten::copy_");
  const at::AutoDispatchBelowAutograd below;
  const Opened opened{&self.storage(), &to.storage()};
  host_view(to).copy_(host_view(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  count([](DeviceWork& work) { ++work.scalars; });
  const at::AutoDispatchBelowAutograd below;
  const Opened opened{&self.storage()};
  return host_view(self).item();
}

// Operations that only make tensors and views.

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype.value_or(at::kFloat),
                                   format);
}

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::kFloat));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                      std::optional<c10::SymInt> offset) {
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  const int64_t begin = offset ? offset->guard_int(__FILE__, __LINE__) : self.storage_offset();
  result.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                                      begin);
  return result;
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  const auto sizes = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  const auto strides = at::detail::computeStride(self.sizes(), self.strides(), sizes);
  TORCH_CHECK(strides, "view: size ", at::IntArrayRef(sizes), " is not compatible with ", self.sizes(), " of strides ",
              self.strides());
  return self.as_strided(sizes, *strides);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return as_strided(self, sizes, strides, std::nullopt);
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  const int64_t d = c10::maybe_wrap_dim(dimension, self.dim());
  std::vector<int64_t> sizes = self.sizes().vec(), strides = self.strides().vec();
  sizes.push_back(size);
  strides.push_back(strides[static_cast<size_t>(d)]);
  sizes[static_cast<size_t>(d)] = (sizes[static_cast<size_t>(d)] - size) / step + 1;
  strides[static_cast<size_t>(d)] *= step;
  return self.as_strided(sizes, strides);
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t wanted = static_cast<size_t>(c10::multiply_integers(sizes)) * self.itemsize();
  c10::StorageImpl* storage = self.storage().unsafeGetStorageImpl();
  if (wanted > storage->nbytes()) {
    TORCH_CHECK(storage->nbytes() == 0, "sealed device: a tensor with values is not resized");
    storage->set_data_ptr_noswap(allocator.allocate(wanted));
    storage->set_nbytes(wanted);
  }
  if (self.sizes() != sizes) self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// All others.

/// Indices may be on the host, as CUDA allows.
bool may_mix(const std::string& name) {
  static const std::set<std::string> names = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};
  return names.contains(name);
}

void check_devices(const std::string& name, const c10::IValue& argument) {
  const auto check = [&](const at::Tensor& t) {
    TORCH_CHECK(!t.defined() || !t.is_cpu() || t.dim() == 0 || may_mix(name), name,
                ": expected all tensors on the sealed device, but one of size ", t.sizes(), " is on the CPU");
  };
  if (argument.isTensor()) check(argument.toTensor());
  if (argument.isTensorList()) {
    for (const at::Tensor& t : argument.toTensorVector()) check(t);
  }
  if (argument.isOptionalTensorList()) {
    for (const auto& t : argument.toOptionalTensorVector()) check(t.value_or(at::Tensor()));
  }
  TORCH_CHECK(!argument.isGenerator() || !argument.toGenerator().defined(), name,
              ": expected a generator of the sealed device, which has none");
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = op.schema().name();
  count_operation(name);
  if (in_operation) return at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    check_devices(name, argument);
  }
  struct Inside {
    Inside() { in_operation = true; }
    ~Inside() { in_operation = false; }
  } const inside;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("_unsafe_view", &view);
  library.impl("unfold", &unfold);
  library.impl("resize_", &resize);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

[[maybe_unused]] const bool registered = [] {
  c10::register_privateuse1_backend("sealed");
  at::RegisterPrivateUse1HooksInterface(new SealedHooks);
  return true;
}();

}  // namespace

at::Device sealed_device() { return {kSealed, 0}; }

CountedWork::CountedWork() {
  const std::lock_guard lock(counter().mutex);
  before_ = counter().work;
}

DeviceWork CountedWork::so_far() const {
  const std::lock_guard lock(counter().mutex);
  DeviceWork work = counter().work;
  work.operations -= before_.operations;
  work.scalars -= before_.scalars;
  work.to_host -= before_.to_host;
  work.to_device -= before_.to_device;
  for (const auto& [name, times] : before_.names) work.names[name] -= times;
  std::erase_if(work.names, [](const auto& name) { return name.second == 0; });
  return work;
}

LimitedMemory::LimitedMemory(int64_t num_bytes) { SealedMemory::instance().set_limit(num_bytes); }
LimitedMemory::~LimitedMemory() { SealedMemory::instance().set_limit(std::numeric_limits<int64_t>::max()); }

int64_t live_bytes() { return SealedMemory::instance().live_bytes(); }
int64_t peak_bytes() { return SealedMemory::instance().peak_bytes(); }
void reset_peak_bytes() { SealedMemory::instance().reset_peak(); }

}  // namespace baseq::test
