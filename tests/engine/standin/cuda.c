// A stand-in for CUDA's runtime and driver on a machine without a GPU: device memory is host memory, streams run at once,
// and a captured graph is a list of what was recorded. Only what this project calls is here. What a GPU would punish
// with a crash or garbage is an error code here: copies outside of allocated blocks, work on a stream that captures.
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, CAPTURE = 900 };

typedef struct Block {
  char* start;
  size_t size;
  struct Block* next;
} Block;

typedef void (*Work)(long);

typedef struct Node {
  int kind;  // 0 copy, 1 set, 2 work
  void* target;
  const void* source;
  size_t size;
  int value;
  Work work;
  long argument;
  struct Node* next;
} Node;

typedef struct Graph {
  Node *first, *last;
} Graph;

static Block* blocks;
static Graph* capturing;
static long allocations, launches;
static size_t limit = (size_t)-1;

static void* allocate(size_t size) {
  void* memory = NULL;
  if (size > limit || posix_memalign(&memory, 256, size ? size : 1)) return NULL;
  memset(memory, 0x7f, size);  // new memory is no zeros
  Block* block = malloc(sizeof *block);
  *block = (Block){memory, size, blocks};
  blocks = block;
  ++allocations;
  return memory;
}

static int release(void* memory) {
  for (Block** at = &blocks; *at; at = &(*at)->next) {
    if ((*at)->start == memory) {
      Block* gone = *at;
      *at = gone->next;
      memset(gone->start, 0x7f, gone->size);
      free(gone->start);
      free(gone);
      return OK;
    }
  }
  return INVALID;
}

int stub_owns(const void* memory, size_t size) {
  for (Block* block = blocks; block; block = block->next) {
    if ((const char*)memory >= block->start && (const char*)memory + size <= block->start + block->size) return 1;
  }
  return 0;
}

static int record(Node node) {
  Node* kept = malloc(sizeof *kept);
  *kept = node;
  kept->next = NULL;
  if (capturing->last) capturing->last->next = kept;
  else capturing->first = kept;
  capturing->last = kept;
  return OK;
}

// What TensorRT's stand-in calls: is a capture running; take this work into it; how often memory was allocated.
int stub_capturing(void) { return capturing != NULL; }
int stub_record(Work work, long argument) {
  return record((Node){.kind = 2, .work = work, .argument = argument});
}
long stub_allocations(void) { return allocations; }
long stub_launches(void) { return launches; }
void stub_limit(size_t size) { limit = size; }

int cudaMalloc(void** memory, size_t size) { return (*memory = allocate(size)) ? OK : OUT_OF_MEMORY; }
int cudaFree(void* memory) { return memory ? release(memory) : OK; }
int cudaMallocHost(void** memory, size_t size) { return (*memory = allocate(size)) ? OK : OUT_OF_MEMORY; }
int cudaHostAlloc(void** memory, size_t size, unsigned flags) { (void)flags; return cudaMallocHost(memory, size); }
int cudaFreeHost(void* memory) { return memory ? release(memory) : OK; }

int cudaMemcpyAsync(void* target, const void* source, size_t size, int kind, void* stream) {
  if (!stream || kind < 1 || kind > 3) return INVALID;
  if ((kind == 1 || kind == 3) && !stub_owns(target, size)) return INVALID;
  if ((kind == 2 || kind == 3) && !stub_owns(source, size)) return INVALID;
  if (capturing) return record((Node){.kind = 0, .target = target, .source = source, .size = size});
  memmove(target, source, size);
  return OK;
}

int cudaMemsetAsync(void* target, int value, size_t size, void* stream) {
  if (!stream || !stub_owns(target, size)) return INVALID;
  if (capturing) return record((Node){.kind = 1, .target = target, .value = value, .size = size});
  memset(target, value, size);
  return OK;
}

int cudaStreamCreateWithFlags(void** stream, unsigned flags) {
  (void)flags;
  *stream = malloc(1);
  return OK;
}
int cudaStreamDestroy(void* stream) {
  free(stream);
  return OK;
}
int cudaStreamSynchronize(void* stream) { return !stream ? INVALID : capturing ? CAPTURE : OK; }

int cudaStreamBeginCapture(void* stream, int mode) {
  if (!stream || mode < 0 || mode > 2 || capturing) return INVALID;
  capturing = calloc(1, sizeof *capturing);
  return OK;
}
int cudaStreamEndCapture(void* stream, void** graph) {
  if (!stream || !capturing) return INVALID;
  *graph = capturing;
  capturing = NULL;
  return OK;
}
int cudaGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  (void)flags;
  Graph* copy = malloc(sizeof *copy);  // the graph's nodes stay with the executable
  *copy = *(Graph*)graph;
  *executable = copy;
  return OK;
}
int cudaGraphLaunch(void* executable, void* stream) {
  if (!stream || capturing) return INVALID;
  ++launches;
  for (Node* node = ((Graph*)executable)->first; node; node = node->next) {
    if (node->kind == 0) memmove(node->target, node->source, node->size);
    if (node->kind == 1) memset(node->target, node->value, node->size);
    if (node->kind == 2) node->work(node->argument);
  }
  return OK;
}
int cudaGraphDestroy(void* graph) {
  free(graph);
  return OK;
}
int cudaGraphExecDestroy(void* executable) {
  free(executable);
  return OK;
}
int cudaGetLastError(void) { return OK; }
const char* cudaGetErrorString(int code) {
  return code == INVALID         ? "invalid argument"
         : code == OUT_OF_MEMORY ? "out of memory"
         : code == CAPTURE       ? "operation not permitted when stream is capturing"
                                 : "no error";
}

// The driver: one GPU of compute capability 8.7 with 8 GB that it shares with the CPU.
int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGetCount(int* count) {
  *count = 1;
  return OK;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return OK;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18;
  return OK;
}
int cuDeviceGetName(char* name, int size, int device) {
  (void)device;
  strncpy(name, "Stand-in GPU", (size_t)size);
  return OK;
}
int cuDeviceTotalMem_v2(size_t* size, int device) {
  (void)device;
  *size = (size_t)8000000000;
  return OK;
}
