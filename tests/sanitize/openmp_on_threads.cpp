// ThreadSanitizer does not see libgomp's barriers and takes everything that crosses one for a race. In this build the
// parallel regions of the library run on std::thread, which it knows, and those of LibTorch, which is not instrumented,
// on one thread.
#include <ATen/Context.h>
#include <dlfcn.h>
#include <omp.h>

#include <thread>
#include <vector>

namespace {

/// Number of this thread in a region of ours and how many there are; a count of 0 outside.
thread_local int number = 0, count = 0;

template <class Function>
Function* libgomp(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

bool is_ours(const void* code) {
  static const char here = 0;
  Dl_info caller{}, own{};
  return dladdr(code, &caller) != 0 && dladdr(&here, &own) != 0 && caller.dli_fbase == own.dli_fbase;
}

/// oneDNN would leave to threads that do not come their shares of a product; MKL asks how many there are.
[[maybe_unused]] const bool without_onednn = [] {
  at::globalContext().setUserEnabledMkldnn(false);
  return true;
}();

}  // namespace

extern "C" {

void GOMP_parallel(void (*region)(void*), void* data, unsigned num_threads, unsigned flags) {
  if (!is_ours(__builtin_return_address(0)) || count > 0) {
    libgomp<void(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel")(region, data, 1, flags);
    return;
  }
  const int wanted = num_threads > 0 ? static_cast<int>(num_threads) : omp_get_max_threads();
  std::vector<std::thread> threads;
  for (int i = 0; i < wanted; ++i) {
    threads.emplace_back([=] {
      number = i;
      count = wanted;
      region(data);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

int omp_get_num_threads() { return count > 0 ? count : libgomp<int()>("omp_get_num_threads")(); }
int omp_get_thread_num() { return count > 0 ? number : libgomp<int()>("omp_get_thread_num")(); }
int omp_in_parallel() { return count > 0 ? 1 : libgomp<int()>("omp_in_parallel")(); }

}  // extern "C"
