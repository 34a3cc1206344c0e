// ThreadSanitizer and fibers: each is a thread to it, and only what orders threads on a GPU orders them. The emulation's own
// bookkeeping is not looked at. Without the sanitizer this is nothing.
#pragma once

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
namespace emulation {
struct Unwatched {
  Unwatched() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unwatched() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }
inline void* this_thread() { return __tsan_get_current_fiber(); }
inline void* new_thread() { return __tsan_create_fiber(0); }  // behind all that the thread that makes it did
inline void end_thread(void* t) { __tsan_destroy_fiber(t); }
inline void become(void* t) { __tsan_switch_to_fiber(t, __tsan_switch_to_fiber_no_sync); }
}  // namespace emulation
#else
namespace emulation {
struct Unwatched {
  Unwatched() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
inline void* this_thread() { return nullptr; }
inline void* new_thread() { return nullptr; }
inline void end_thread(void*) {}
inline void become(void*) {}
}  // namespace emulation
#endif
