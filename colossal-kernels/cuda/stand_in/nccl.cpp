// A stand-in for NCCL between processes of one machine: messages go through memory that they share.
//
// A communicator is a file in /dev/shm with a ring of bytes from each rank to each. All calls are
// lists of messages, moved until all have come; a collective sums what came in the order of ranks.
// Streams of the stand-in driver run at once, and so do calls here: they return when they are done.

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace {

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6 };
constexpr size_t ROOM = 1 << 16;

struct Ring {
  std::atomic<uint64_t> written, read;
  uint8_t bytes[ROOM];
};

struct Shared {
  std::atomic<uint32_t> joined, left;
  Ring rings[];  // [from][to]
};

struct Comm {
  std::string name;
  int rank, ranks, splits = 0;
  Shared* shared = nullptr;
  std::atomic<bool> aborted{false};

  Ring& ring(int from, int to) { return shared->rings[from * ranks + to]; }
};

Comm* join(const std::string& name, int rank, int ranks) {
  const size_t bytes = sizeof(Shared) + sizeof(Ring) * ranks * ranks;
  const std::string path = "/dev/shm/" + name;
  const int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, (off_t)bytes) != 0) return nullptr;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return nullptr;
  auto* const comm = new Comm{name, rank, ranks};
  comm->shared = static_cast<Shared*>(memory);
  // Everybody has it open: the name is not needed any more.
  if (comm->shared->joined.fetch_add(1) + 1 == (uint32_t)ranks) unlink(path.c_str());
  return comm;
}

struct Message {
  bool send;
  uint8_t* at;
  size_t bytes;
  int peer;
};

// Moves bytes until all messages have gone and come; those between two ranks in their order.
int exchange(Comm& comm, std::vector<Message> messages) {
  size_t open = messages.size();
  for (const Message& m : messages) open -= m.bytes == 0;
  while (open > 0) {
    bool moved = false;
    std::vector<bool> busy[2] = {std::vector<bool>(comm.ranks), std::vector<bool>(comm.ranks)};
    for (Message& m : messages) {
      if (m.bytes == 0 || busy[m.send][m.peer]) continue;
      busy[m.send][m.peer] = true;
      Ring& ring = m.send ? comm.ring(comm.rank, m.peer) : comm.ring(m.peer, comm.rank);
      const uint64_t written = ring.written.load(), read = ring.read.load(), at = m.send ? written : read;
      size_t n = std::min<size_t>(m.send ? ROOM - (written - read) : written - read, m.bytes);
      n = std::min(n, ROOM - at % ROOM);
      if (n == 0) continue;
      uint8_t* const there = ring.bytes + at % ROOM;
      if (m.send) memcpy(there, m.at, n);
      else memcpy(m.at, there, n);
      (m.send ? ring.written : ring.read).store(at + n);
      m.at += n;
      m.bytes -= n;
      open -= m.bytes == 0;
      moved = true;
    }
    if (!moved) {
      if (comm.aborted.load() || comm.shared->left.load() != 0) return REMOTE_ERROR;
      sched_yield();
    }
  }
  return SUCCESS;
}

// ---- Groups: calls are gathered, and made at the end.

struct Call {
  Comm* comm;
  std::vector<Message> messages;
  std::function<void()> after;
};

thread_local int depth = 0;
thread_local std::vector<Call> gathered;

int make(std::vector<Call>& calls) {
  std::vector<Comm*> comms;
  for (const Call& c : calls)
    if (std::find(comms.begin(), comms.end(), c.comm) == comms.end()) comms.push_back(c.comm);
  for (Comm* comm : comms) {
    std::vector<Message> all;
    for (const Call& c : calls)
      if (c.comm == comm) all.insert(all.end(), c.messages.begin(), c.messages.end());
    if (const int code = exchange(*comm, std::move(all))) return code;
  }
  for (const Call& c : calls)
    if (c.after) c.after();
  return SUCCESS;
}

int call(Comm* comm, std::vector<Message> messages, std::function<void()> after = {}) {
  if (comm == nullptr) return INVALID_ARGUMENT;
  std::vector<Call> one{{comm, std::move(messages), std::move(after)}};
  if (depth == 0) return make(one);
  gathered.push_back(std::move(one[0]));
  return SUCCESS;
}

// ---- Types, by NCCL's numbers.

constexpr size_t SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};

struct Bf16 { uint16_t bits; };
float widen(Bf16 x) { const uint32_t u = (uint32_t)x.bits << 16; float y; memcpy(&y, &u, 4); return y; }
template <class E> E widen(E x) { return x; }
void narrow(float f, Bf16& y) {
  uint32_t u;
  memcpy(&u, &f, 4);
  y.bits = f != f ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
template <class E, class S> void narrow(S x, E& y) { y = (E)x; }

// S is what sums are kept in.
template <class E, class S> void reduce(const uint8_t* parts, int ranks, size_t n, int op, uint8_t* to) {
  const E* const x = reinterpret_cast<const E*>(parts);
  E* const y = reinterpret_cast<E*>(to);
  for (size_t i = 0; i < n; ++i) {
    S s = (S)widen(x[i]);
    for (int r = 1; r < ranks; ++r) {
      const S p = (S)widen(x[r * n + i]);
      s = op == 2 ? std::max(s, p) : op == 3 ? std::min(s, p) : s + p;
    }
    narrow(op == 4 ? s / (S)ranks : s, y[i]);
  }
}

void reduce(int type, const uint8_t* parts, int ranks, size_t n, int op, uint8_t* to) {
  switch (type) {
    case 0: return reduce<int8_t, int8_t>(parts, ranks, n, op, to);
    case 1: return reduce<uint8_t, uint8_t>(parts, ranks, n, op, to);
    case 2: return reduce<int32_t, int32_t>(parts, ranks, n, op, to);
    case 3: return reduce<uint32_t, uint32_t>(parts, ranks, n, op, to);
    case 4: return reduce<int64_t, int64_t>(parts, ranks, n, op, to);
    case 5: return reduce<uint64_t, uint64_t>(parts, ranks, n, op, to);
    case 6: return reduce<_Float16, float>(parts, ranks, n, op, to);
    case 7: return reduce<float, float>(parts, ranks, n, op, to);
    case 8: return reduce<double, double>(parts, ranks, n, op, to);
    default: return reduce<Bf16, float>(parts, ranks, n, op, to);
  }
}

uint8_t* bytes(const void* p) { return static_cast<uint8_t*>(const_cast<void*>(p)); }

// Every rank sends `from + rank * stride` to each of `roots`, which sum what comes.
int sums(const void* from, size_t stride, void* to, size_t n, int t, int op, Comm* comm, bool (*root)(int, int), int at) {
  if (comm == nullptr) return INVALID_ARGUMENT;
  const size_t size = n * SIZES[t];
  std::vector<Message> messages;
  for (int r = 0; r < comm->ranks; ++r)
    if (root(r, at)) messages.push_back({true, bytes(from) + r * stride, size, r});
  if (!root(comm->rank, at)) return call(comm, messages);
  auto parts = std::make_shared<std::vector<uint8_t>>(size * comm->ranks);
  for (int r = 0; r < comm->ranks; ++r) messages.push_back({false, parts->data() + r * size, size, r});
  const int ranks = comm->ranks;
  return call(comm, messages, [=] { reduce(t, parts->data(), ranks, n, op, bytes(to)); });
}

bool everybody(int, int) { return true; }
bool one(int rank, int root) { return rank == root; }

}  // namespace

struct UniqueId { char bytes[128]; };

extern "C" {

int ncclGetVersion(int* version) { *version = 22304; return SUCCESS; }

int ncclGetUniqueId(UniqueId* id) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  snprintf(id->bytes, sizeof id->bytes, "stand-in-nccl-%d-%lld", getpid(), (long long)now);
  return SUCCESS;
}

int ncclCommInitRankConfig(Comm** comm, int ranks, UniqueId id, int rank, void*) {
  *comm = join(id.bytes, rank, ranks);
  return *comm ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommSplit(Comm* parent, int color, int key, Comm** comm, void*) {
  struct Wish { int color, key, rank; } own{color, key, parent->rank};
  std::vector<Wish> all(parent->ranks);
  std::vector<Message> messages;
  for (int r = 0; r < parent->ranks; ++r) {
    messages.push_back({true, bytes(&own), sizeof own, r});
    messages.push_back({false, bytes(&all[r]), sizeof own, r});
  }
  if (const int code = exchange(*parent, messages)) return code;
  all.erase(std::remove_if(all.begin(), all.end(), [=](Wish w) { return w.color != color; }), all.end());
  std::stable_sort(all.begin(), all.end(), [](Wish a, Wish b) { return a.key < b.key; });
  int rank = 0;
  while (all[rank].rank != parent->rank) ++rank;
  const std::string name = parent->name + "-" + std::to_string(parent->splits++) + "-" + std::to_string(color);
  *comm = join(name, rank, (int)all.size());
  return *comm ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommGetAsyncError(Comm*, int* state) { *state = SUCCESS; return SUCCESS; }
int ncclCommFinalize(Comm*) { return SUCCESS; }
int ncclCommDestroy(Comm*) { return SUCCESS; }
int ncclCommAbort(Comm* comm) {
  comm->aborted = true;
  comm->shared->left.fetch_add(1);
  return SUCCESS;
}

int ncclGroupStart() { ++depth; return SUCCESS; }
int ncclGroupEnd() {
  if (--depth > 0) return SUCCESS;
  std::vector<Call> calls;
  calls.swap(gathered);
  return make(calls);
}

int ncclSend(const void* from, size_t n, int t, int peer, Comm* comm, void*) {
  return call(comm, {{true, bytes(from), n * SIZES[t], peer}});
}
int ncclRecv(void* to, size_t n, int t, int peer, Comm* comm, void*) {
  return call(comm, {{false, bytes(to), n * SIZES[t], peer}});
}

int ncclAllReduce(const void* from, void* to, size_t n, int t, int op, Comm* comm, void*) {
  return sums(from, 0, to, n, t, op, comm, everybody, 0);
}
int ncclReduceScatter(const void* from, void* to, size_t n, int t, int op, Comm* comm, void*) {
  return sums(from, n * SIZES[t], to, n, t, op, comm, everybody, 0);
}
int ncclReduce(const void* from, void* to, size_t n, int t, int op, int root, Comm* comm, void*) {
  return sums(from, 0, to, n, t, op, comm, one, root);
}

int ncclAllGather(const void* from, void* to, size_t n, int t, Comm* comm, void*) {
  const size_t size = n * SIZES[t];
  // In place the own part lies where it goes.
  auto own = std::make_shared<std::vector<uint8_t>>(bytes(from), bytes(from) + size);
  std::vector<Message> messages;
  for (int r = 0; r < comm->ranks; ++r) {
    messages.push_back({true, own->data(), size, r});
    messages.push_back({false, bytes(to) + r * size, size, r});
  }
  return call(comm, messages, [own] {});
}

int ncclBroadcast(const void* from, void* to, size_t n, int t, int root, Comm* comm, void*) {
  const size_t size = n * SIZES[t];
  std::vector<Message> messages;
  for (int r = 0; r < comm->ranks && comm->rank == root; ++r)
    if (r != root) messages.push_back({true, bytes(from), size, r});
  if (comm->rank == root) memmove(to, from, size);
  else messages.push_back({false, bytes(to), size, root});
  return call(comm, messages);
}

}  // extern "C"
