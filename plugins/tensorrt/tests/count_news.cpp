// Counts what this process allocates, the plugin library included: it finds this operator new before its own.
#include <atomic>
#include <cstdlib>
#include <new>

std::atomic<long> g_news{0};

void* operator new(std::size_t size) {
  g_news++;
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
