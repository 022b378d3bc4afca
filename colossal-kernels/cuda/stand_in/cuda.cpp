// A libcuda for machines without a GPU: memory of the host as that of a device, streams that run at
// once, kernels that g++ compiled (see nvrtc.cpp, cuemu.h). What a driver would refuse is refused:
// copies and frees beyond an allocation, handles that are not alive, grids that are too large.
//
// STAND_IN_DEVICES     how many devices there are (6, of which number 4 is of the architecture sm_90)
// STAND_IN_MEMORY      bytes of each (4 GiB)
// STAND_IN_ORDER       order of threads: 0 ascending, 1 descending, else the seed of a shuffle
// STAND_IN_LOSE_AFTER  the device is lost at this launch, counted over all
#include "graph.h"

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <dlfcn.h>
#include <elf.h>
#include <setjmp.h>
#include <signal.h>
#include <unistd.h>

#include "cuemu.h"

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101,
  INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
  ILLEGAL_ADDRESS = 700, LAUNCH_OUT_OF_RESOURCES = 701, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801,
};

using Address = unsigned long long;
using Kernel = int (*)(cuemu::Launch*);

constexpr int MOST_DEVICES = 64;
constexpr size_t PAGE = 4096;

struct Device { int ordinal; size_t used; bool lost; };
struct Stream { Device* device; Capture* capture; };
struct Event { Device* device; bool recorded, captured; double at; };
struct Module { Device* device; void* library; };
struct Function { Device* device; Kernel kernel; const unsigned* sizes; std::string name; int shared; };
struct Executable { Device* device; Graph graph; };
struct Allocation { size_t bytes; Device* device; char* mapping; size_t mapped; };

std::recursive_mutex mutex;
Device devices[MOST_DEVICES];
std::map<Address, Allocation> allocations;
std::map<void*, size_t> pinned;
std::set<void*> alive;  // streams, events, modules, functions, graphs
long launches;
thread_local Device* current;

using Lock = std::lock_guard<std::recursive_mutex>;

size_t number(const char* name, size_t otherwise) {
  const char* value = getenv(name);
  return value && *value ? strtoull(value, nullptr, 10) : otherwise;
}
int device_count() { return int(number("STAND_IN_DEVICES", 6)); }
size_t memory() { return number("STAND_IN_MEMORY", size_t(4) << 30); }

int say(int code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  fprintf(stderr, "stand-in driver: ");
  vfprintf(stderr, format, values);
  fprintf(stderr, "\n");
  va_end(values);
  return code;
}

int ready() {
  if (!current) return INVALID_CONTEXT;
  return current->lost ? LAUNCH_FAILED : SUCCESS;
}
#define READY() do { if (int code_ = ready()) return code_; } while (0)

/// A stream of the current device; the null stream belongs to whichever is current.
int usable(void* stream) {
  READY();
  if (!stream) return SUCCESS;
  if (!alive.count(stream)) return say(INVALID_HANDLE, "a stream that is not alive");
  if (static_cast<Stream*>(stream)->device != current) return say(INVALID_HANDLE, "a stream of another device");
  return SUCCESS;
}
#define USABLE(stream) do { if (int code_ = usable(stream)) return code_; } while (0)
#define PERMITTED() do { if (int code_ = permitted(__func__)) return code_; } while (0)

Capture* capture_of(void* stream) { return stream ? static_cast<Stream*>(stream)->capture : nullptr; }

/// Refuses a copy between a stream that captures and memory of the host that may move.
int stays(void* stream, const void* host, size_t bytes) {
  if (!capture_of(stream)) return SUCCESS;
  auto next = pinned.upper_bound(const_cast<void*>(host));
  if (next != pinned.begin()) {
    const auto& [start, size] = *--next;
    if (static_cast<const char*>(host) + bytes <= static_cast<char*>(start) + size) return SUCCESS;
  }
  return settled(capture_of(stream), "a copy of pageable memory on");
}
#define STAYS(stream, host, bytes) do { if (int code_ = stays(stream, host, bytes)) return code_; } while (0)

bool inside(Address at, size_t bytes) {
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return false;
  const auto& [start, a] = *--next;
  return at + bytes <= start + a.bytes;
}

int allocate(Address* out, size_t bytes) {
  READY();
  if (!bytes) return INVALID_VALUE;
  if (current->used + bytes > memory()) return OUT_OF_MEMORY;
  // The end lies before a page that cannot be touched; the start is aligned as a driver's is.
  const size_t room = (bytes + 255) / 256 * 256, pages = (room + PAGE - 1) / PAGE * PAGE;
  void* space = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return OUT_OF_MEMORY;
  char* first = static_cast<char*>(space) + PAGE;
  if (mprotect(first, pages, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
  char* start = first + (pages - room);
  memset(start, 0xff, room);
  *out = reinterpret_cast<Address>(start);
  allocations[*out] = {bytes, current, static_cast<char*>(space), pages + 2 * PAGE};
  current->used += bytes;
  return SUCCESS;
}

int release(Address at) {
  auto found = allocations.find(at);
  if (found == allocations.end()) return say(INVALID_VALUE, "free of %#llx, which nobody allocated", at);
  const Allocation a = found->second;
  int code = SUCCESS;
  const unsigned char* end = reinterpret_cast<const unsigned char*>(at + a.bytes);
  for (size_t i = 0; i < (256 - a.bytes % 256) % 256; ++i)
    if (end[i] != 0xff) { code = say(ILLEGAL_ADDRESS, "written %zu bytes beyond the end of %zu", i, a.bytes); break; }
  a.device->used -= a.bytes;
  munmap(a.mapping, a.mapped);
  allocations.erase(found);
  return code;
}

int copy(Address to, bool to_device, Address from, bool from_device, size_t bytes) {
  READY();
  if ((to_device && !inside(to, bytes)) || (from_device && !inside(from, bytes)))
    return say(INVALID_VALUE, "a copy of %zu bytes beyond an allocation", bytes);
  memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  return SUCCESS;
}

int fill(Address to, unsigned char value, size_t bytes) {
  READY();
  if (!inside(to, bytes)) return say(INVALID_VALUE, "a fill of %zu bytes beyond an allocation", bytes);
  memset(reinterpret_cast<void*>(to), value, bytes);
  return SUCCESS;
}

/// Where to go on when a kernel touches what is not there.
thread_local sigjmp_buf* escape;
struct sigaction before;
void touched(int, siginfo_t*, void*) {
  if (escape) siglongjmp(*escape, 1);
  sigaction(SIGSEGV, &before, nullptr);  // Not a kernel's: as if nobody had looked.
}

}  // namespace

API cuInit(unsigned) {
  Lock lock(mutex);
  for (int i = 0; i < MOST_DEVICES; ++i) devices[i].ordinal = i;
  return device_count() ? SUCCESS : NO_DEVICE;
}
API cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }

API cuGetErrorName(int code, const char** text) {
  switch (code) {
    case SUCCESS: *text = "CUDA_SUCCESS"; break;
    case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case LAUNCH_FAILED: *text = "CUDA_ERROR_LAUNCH_FAILED"; break;
    case ILLEGAL_ADDRESS: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
    default: *text = "CUDA_ERROR"; break;
  }
  return SUCCESS;
}
API cuGetErrorString(int code, const char** text) {
  switch (code) {
    case SUCCESS: *text = "no error"; break;
    case INVALID_VALUE: *text = "invalid argument"; break;
    case OUT_OF_MEMORY: *text = "out of memory"; break;
    case NO_DEVICE: *text = "no CUDA-capable device is detected"; break;
    case INVALID_CONTEXT: *text = "invalid device context"; break;
    case INVALID_HANDLE: *text = "invalid resource handle"; break;
    case NOT_FOUND: *text = "named symbol not found"; break;
    case ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; break;
    case LAUNCH_OUT_OF_RESOURCES: *text = "too many resources requested for launch"; break;
    case LAUNCH_FAILED: *text = "unspecified launch failure"; break;
    case NOT_SUPPORTED: *text = "operation not supported by the stand-in"; break;
    case CAPTURE_UNSUPPORTED: *text = "operation not permitted when stream is capturing"; break;
    case CAPTURE_INVALIDATED: *text = "operation failed due to a previous error during capture"; break;
    default: *text = "an error"; break;
  }
  return SUCCESS;
}

API cuDeviceGetCount(int* count) { *count = device_count(); return SUCCESS; }
API cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= device_count()) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}
API cuDeviceGetName(char* name, int room, int device) { snprintf(name, room, "stand-in %d", device); return SUCCESS; }
API cuDeviceGetUuid_v2(char* uuid, int device) { memset(uuid, device, 16); return SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = memory(); return SUCCESS; }
API cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;          // threads of a block
    case 8: *value = 48 << 10; break;      // shared memory of a block
    case 10: *value = 32; break;           // threads of a warp
    case 16: *value = 4; break;            // multiprocessors
    case 75: *value = device == 4 ? 9 : 8; break;            // compute capability
    case 76: *value = 0; break;
    case 81: case 97: *value = 227 << 10; break;
    case 115: *value = 1; break;           // memory pools
    default: *value = 0;
  }
  return SUCCESS;
}
// Keeps for copy_box (hopper.cuh) what the driver would encode: the address, 4 dims, 3 strides, 4 sizes of a
// box. Refuses what the driver refuses of two-byte elements in swizzled lines of 128 bytes.
API cuTensorMapEncodeTiled(uint64_t* map, int type, uint32_t rank, uint64_t address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           int swizzle, int, int) {
  bool fits = (type == 6 || type == 9) && rank == 4 && address % 16 == 0 && !interleave && swizzle == 3 && box[0] <= 64;
  for (int i = 0; i < 4; ++i) fits &= dims[i] >= 1 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  for (int i = 0; i < 3; ++i) fits &= strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40;
  if (!fits) return INVALID_VALUE;
  memcpy(map, &address, 8);
  memcpy(map + 1, dims, 32);
  memcpy(map + 5, strides, 24);
  memcpy(map + 8, box, 16);
  return SUCCESS;
}
API cuDeviceCanAccessPeer(int* can, int, int) { *can = 1; return SUCCESS; }
API cuCtxEnablePeerAccess(void*, unsigned) { return SUCCESS; }
API cuDevicePrimaryCtxRetain(void** context, int device) {
  if (device < 0 || device >= device_count()) return INVALID_DEVICE;
  devices[device].ordinal = device;
  *context = &devices[device];
  return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxGetCurrent(void** context) { *context = current; return SUCCESS; }
API cuCtxSetCurrent(void* context) { current = static_cast<Device*>(context); return SUCCESS; }
API cuCtxGetDevice(int* device) { READY(); *device = current->ordinal; return SUCCESS; }
API cuCtxSynchronize() { READY(); PERMITTED(); return SUCCESS; }

API cuMemGetInfo_v2(size_t* free, size_t* total) {
  Lock lock(mutex);
  READY();
  *total = memory();
  *free = *total - current->used;
  return SUCCESS;
}
API cuMemAlloc_v2(Address* out, size_t bytes) { Lock lock(mutex); PERMITTED(); return allocate(out, bytes); }
API cuMemFree_v2(Address at) { Lock lock(mutex); PERMITTED(); READY(); return release(at); }
#define SETTLED(stream) do { if (int code_ = settled(capture_of(stream), __func__)) return code_; } while (0)
API cuMemAllocAsync(Address* out, size_t bytes, void* stream) { Lock lock(mutex); USABLE(stream); SETTLED(stream); return allocate(out, bytes); }
API cuMemFreeAsync(Address at, void* stream) { Lock lock(mutex); USABLE(stream); SETTLED(stream); return release(at); }
API cuMemHostAlloc(void** out, size_t bytes, unsigned) {
  Lock lock(mutex);
  READY();
  PERMITTED();
  *out = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
  if (!*out) return OUT_OF_MEMORY;
  pinned[*out] = bytes;
  return SUCCESS;
}
API cuMemFreeHost(void* at) {
  Lock lock(mutex);
  PERMITTED();
  if (!pinned.erase(at)) return say(INVALID_VALUE, "free of pinned memory that nobody allocated");
  free(at);
  return SUCCESS;
}

API cuMemcpyHtoD_v2(Address to, const void* from, size_t n) { Lock lock(mutex); PERMITTED(); return copy(to, true, Address(from), false, n); }
API cuMemcpyDtoH_v2(void* to, Address from, size_t n) { Lock lock(mutex); PERMITTED(); return copy(Address(to), false, from, true, n); }
API cuMemcpyDtoD_v2(Address to, Address from, size_t n) { Lock lock(mutex); PERMITTED(); return copy(to, true, from, true, n); }
API cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t n, void* s) { Lock lock(mutex); USABLE(s); STAYS(s, from, n); return put(capture_of(s), [=] { return copy(to, true, Address(from), false, n); }); }
API cuMemcpyDtoHAsync_v2(void* to, Address from, size_t n, void* s) { Lock lock(mutex); USABLE(s); STAYS(s, to, n); return put(capture_of(s), [=] { return copy(Address(to), false, from, true, n); }); }
API cuMemcpyDtoDAsync_v2(Address to, Address from, size_t n, void* s) { Lock lock(mutex); USABLE(s); return put(capture_of(s), [=] { return copy(to, true, from, true, n); }); }
API cuMemcpyPeerAsync(Address to, void*, Address from, void*, size_t n, void* s) { Lock lock(mutex); USABLE(s); return put(capture_of(s), [=] { return copy(to, true, from, true, n); }); }
API cuMemsetD8_v2(Address to, unsigned char v, size_t n) { Lock lock(mutex); PERMITTED(); return fill(to, v, n); }
API cuMemsetD8Async(Address to, unsigned char v, size_t n, void* s) { Lock lock(mutex); USABLE(s); return put(capture_of(s), [=] { return fill(to, v, n); }); }

API cuStreamCreate(void** out, unsigned) { Lock lock(mutex); READY(); alive.insert(*out = new Stream{current, nullptr}); return SUCCESS; }
API cuStreamCreateWithPriority(void** out, unsigned flags, int) { return cuStreamCreate(out, flags); }
API cuStreamDestroy_v2(void* stream) {
  Lock lock(mutex);
  if (!alive.erase(stream)) return say(INVALID_HANDLE, "destroying a stream that is not alive");
  delete static_cast<Stream*>(stream);
  return SUCCESS;
}
API cuStreamSynchronize(void* stream) { Lock lock(mutex); USABLE(stream); SETTLED(stream); return SUCCESS; }
API cuStreamQuery(void* stream) { Lock lock(mutex); USABLE(stream); SETTLED(stream); return SUCCESS; }
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  Lock lock(mutex);
  USABLE(stream);
  if (!alive.count(event)) return say(INVALID_HANDLE, "waiting for an event that is not alive");
  // A real driver would have the stream join the capture; nothing here does that.
  if (static_cast<Event*>(event)->captured && !capture_of(stream)) return say(CAPTURE_UNSUPPORTED, "waiting for an event of a capture");
  return SUCCESS;
}

API cuEventCreate(void** out, unsigned) { Lock lock(mutex); READY(); alive.insert(*out = new Event{current, false, false, 0}); return SUCCESS; }
API cuEventRecord(void* event, void* stream) {
  Lock lock(mutex);
  USABLE(stream);
  if (!alive.count(event)) return say(INVALID_HANDLE, "recording an event that is not alive");
  Event* e = static_cast<Event*>(event);
  if (e->device != current) return say(INVALID_HANDLE, "recording an event of another device");
  if ((e->captured = capture_of(stream))) return SUCCESS;
  e->recorded = true;
  e->at = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
  return SUCCESS;
}
API cuEventQuery(void* event) { Lock lock(mutex); PERMITTED(); READY(); return alive.count(event) ? SUCCESS : INVALID_HANDLE; }
API cuEventSynchronize(void* event) { Lock lock(mutex); PERMITTED(); READY(); return alive.count(event) ? SUCCESS : INVALID_HANDLE; }
API cuEventElapsedTime_v2(float* out, void* first, void* last) {
  Lock lock(mutex);
  if (!alive.count(first) || !alive.count(last)) return INVALID_HANDLE;
  const Event *a = static_cast<Event*>(first), *b = static_cast<Event*>(last);
  if (!a->recorded || !b->recorded) return say(INVALID_HANDLE, "the time between events that were not recorded");
  *out = float(b->at - a->at);
  return SUCCESS;
}
API cuEventElapsedTime(float* out, void* first, void* last) { return cuEventElapsedTime_v2(out, first, last); }
API cuEventDestroy_v2(void* event) {
  Lock lock(mutex);
  if (!alive.erase(event)) return say(INVALID_HANDLE, "destroying an event that is not alive");
  delete static_cast<Event*>(event);
  return SUCCESS;
}

API cuModuleLoadData(void** out, const void* image) {
  Lock lock(mutex);
  READY();
  PERMITTED();
  const auto* elf = static_cast<const Elf64_Ehdr*>(image);
  if (memcmp(elf->e_ident, ELFMAG, SELFMAG)) return INVALID_IMAGE;
  // The table of sections is what a linker writes last.
  const size_t bytes = elf->e_shoff + size_t(elf->e_shnum) * elf->e_shentsize;
  const char* temporary = getenv("TMPDIR");
  std::string path = std::string(temporary ? temporary : "/tmp") + "/stand-in-XXXXXX";
  const int file = mkstemp(path.data());
  if (file < 0) return INVALID_IMAGE;
  const bool written = ::write(file, image, bytes) == ssize_t(bytes);
  close(file);
  void* library = written ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
  unlink(path.c_str());
  if (!library) return say(INVALID_IMAGE, "an image that cannot be loaded: %s", dlerror());
  alive.insert(*out = new Module{current, library});
  return SUCCESS;
}
API cuModuleUnload(void* module) { Lock lock(mutex); return alive.erase(module) ? SUCCESS : INVALID_HANDLE; }
API cuModuleGetFunction(void** out, void* module, const char* name) {
  Lock lock(mutex);
  READY();
  if (!alive.count(module)) return INVALID_HANDLE;
  const Module* m = static_cast<Module*>(module);
  void* kernel = dlsym(m->library, (std::string("cuemu_") + name).c_str());
  auto* sizes = reinterpret_cast<const unsigned* (*)()>(dlsym(m->library, (std::string("sizes_") + name).c_str()));
  if (!kernel || !sizes) return NOT_FOUND;
  alive.insert(*out = new Function{m->device, reinterpret_cast<Kernel>(kernel), sizes(), name, 48 << 10});
  return SUCCESS;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
  Lock lock(mutex);
  if (!alive.count(function)) return INVALID_HANDLE;
  if (attribute != 8) return SUCCESS;
  if (value > int(cuemu::SHARED)) return INVALID_VALUE;
  static_cast<Function*>(function)->shared = value;
  return SUCCESS;
}
API cuFuncGetAttribute(int* value, int attribute, void* function) {
  Lock lock(mutex);
  if (!alive.count(function)) return INVALID_HANDLE;
  *value = attribute == 0 ? 1024 : attribute == 8 ? static_cast<Function*>(function)->shared : 0;
  return SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { *blocks = 2; return SUCCESS; }

namespace {

/// Runs a kernel that the driver has accepted.
int launch(const Function* f, cuemu::Dim grid, cuemu::Dim block, unsigned shared, void** args) {
  READY();
  if (++launches == long(number("STAND_IN_LOSE_AFTER", 0))) {
    current->lost = true;
    return SUCCESS;  // As a real one: who looks next is told.
  }
  cuemu::Launch launch{grid, block, shared, args, unsigned(number("STAND_IN_ORDER", 0)), ""};
  struct sigaction now = {};
  now.sa_sigaction = touched;
  now.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGSEGV, &now, &before);
  sigjmp_buf here;
  escape = &here;
  int code;
  if (sigsetjmp(here, 1)) {
    snprintf(launch.message, sizeof launch.message, "touched memory that is not allocated");
    code = ILLEGAL_ADDRESS;
  } else {
    code = f->kernel(&launch);
  }
  escape = nullptr;
  sigaction(SIGSEGV, &before, nullptr);
  if (code) {
    say(code, "kernel %s: %s", f->name.c_str(), launch.message);
    current->lost = true;
  }
  return code;
}

}  // namespace

API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** args, void**) {
  Lock lock(mutex);
  USABLE(stream);
  if (!alive.count(function)) return INVALID_HANDLE;
  const Function* f = static_cast<Function*>(function);
  if (f->device != current) return say(INVALID_HANDLE, "%s was loaded on another device", f->name.c_str());
  if (!gx || !gy || !gz || !bx || !by || !bz || gx > 0x7fffffffu || gy > 65535 || gz > 65535 || bz > 64 || by > 1024 || bx > 1024)
    return INVALID_VALUE;
  if (size_t(bx) * by * bz > 1024) return LAUNCH_OUT_OF_RESOURCES;
  if (shared > unsigned(f->shared)) return INVALID_VALUE;
  const cuemu::Dim grid{gx, gy, gz}, block{bx, by, bz};
  Capture* const capture = capture_of(stream);
  if (!capture) return launch(f, grid, block, shared, args);
  return put(capture, [=, kept = std::make_shared<Arguments>(f->sizes, args)] {
    return kept->with([&](void** copies) { return launch(f, grid, block, shared, copies); });
  });
}

API cuStreamBeginCapture_v2(void* stream, int mode) {
  Lock lock(mutex);
  USABLE(stream);
  if (!stream) return say(CAPTURE_UNSUPPORTED, "the null stream cannot capture");
  return begin(&static_cast<Stream*>(stream)->capture, mode);
}
API cuStreamEndCapture(void* stream, void** graph) {
  Lock lock(mutex);
  USABLE(stream);
  if (!stream) return ILLEGAL_STATE;
  Graph* made = nullptr;
  const int code = end(&static_cast<Stream*>(stream)->capture, &made);
  if (made) alive.insert(made);
  *graph = made;
  return code;
}
API cuStreamIsCapturing(void* stream, int* status) {
  Lock lock(mutex);
  USABLE(stream);
  const Capture* capture = capture_of(stream);
  *status = !capture ? 0 : capture->void_ ? 2 : 1;
  return SUCCESS;
}
API cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
  Lock lock(mutex);
  READY();
  PERMITTED();
  if (!alive.count(graph)) return say(INVALID_HANDLE, "a graph that is not alive");
  alive.insert(*out = new Executable{current, *static_cast<Graph*>(graph)});
  return SUCCESS;
}
API cuGraphDestroy(void* graph) {
  Lock lock(mutex);
  if (!alive.erase(graph)) return say(INVALID_HANDLE, "destroying a graph that is not alive");
  delete static_cast<Graph*>(graph);
  return SUCCESS;
}
API cuGraphLaunch(void* executable, void* stream) {
  Lock lock(mutex);
  USABLE(stream);
  SETTLED(stream);
  if (!alive.count(executable)) return say(INVALID_HANDLE, "launching a graph that is not alive");
  const Executable* e = static_cast<Executable*>(executable);
  if (e->device != current) return say(INVALID_HANDLE, "a graph of another device");
  return run(e->graph);
}
API cuGraphExecDestroy(void* executable) {
  Lock lock(mutex);
  if (!alive.erase(executable)) return say(INVALID_HANDLE, "destroying a graph that is not alive");
  delete static_cast<Executable*>(executable);
  return SUCCESS;
}

/// For libraries of products: their work of a stream, done now or kept for a graph.
API stand_in_put(void* stream, const Work* work) {
  {
    Lock lock(mutex);
    USABLE(stream);
    if (Capture* capture = capture_of(stream)) return put(capture, *work);
  }
  return (*work)();  // Products of several ranks run side by side.
}
